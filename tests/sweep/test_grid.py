"""Axes as people write them: what they span, and a sentence for each way to get them wrong."""

import itertools
import math

import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.core.config import declared
from fedjax_med.core.errors import UserError
from fedjax_med.sweep import grid

KNOWN = list(declared())
SIGMA, RATE = "privacy.noise_multiplier", "client.learning_rate"


def points(**axes):
  return grid.points(get_config(), KNOWN, **axes)


@pytest.mark.parametrize(
  ("text", "values"),
  [
    (f"{SIGMA}=0.5,1,2", [0.5, 1.0, 2.0]),
    (f"config.{SIGMA}=3", [3.0]),
    ("seed=0:5", [0, 1, 2, 3, 4]),
    ("seed=10:4:-3", [10, 7]),
    ("seed=7,3", [7, 3]),
    (f"{RATE}=lin:0:1:5", [0.0, 0.25, 0.5, 0.75, 1.0]),
    (f"{RATE}=log:1e-3:1e-1:3", [0.001, 0.01, 0.1]),
    ("server.num_rounds=log:1:100:3", [1, 10, 100]),
    ("privacy.same_noise=true,False", [True, False]),
    ("model.name=linear, se_resnext_micro", ["linear", "se_resnext_micro"]),
    ("privacy.target_epsilon=1,inf", [1.0, math.inf]),
  ],
)
def test_values_are_what_was_written(text, values):
  found = grid.parse_axis(text, get_config(), KNOWN)[1]
  assert found == values
  assert [type(value) for value in found] == [type(value) for value in values]


def test_grid_is_the_product_and_zip_advances_together():
  found = points(grid=[f"{SIGMA}=1,2", "seed=0:2"], together=[f"{RATE}=0.1,0.2", "data.seed=5,6"])
  assert len(found) == 8
  together = [(0.1, 5), (0.2, 6)]
  expected = itertools.product(together, [1.0, 2.0], [0, 1])
  for point, ((rate, data_seed), sigma, seed) in zip(found, expected, strict=True):
    assert point == {RATE: rate, "data.seed": data_seed, SIGMA: sigma, "seed": seed}


def test_random_points_lie_between_the_ends_are_the_same_for_a_seed_and_even_in_the_logarithm():
  axes = [f"{RATE}=log:1e-4:1", "privacy.clip_norm=lin:1:3", "seed=0:9", "model.name=linear,x"]
  found = points(random=axes, trials=4000, random_seed=1)
  assert found == points(random=axes, trials=4000, random_seed=1)
  assert found != points(random=axes, trials=4000, random_seed=2)
  rates = np.array([point[RATE] for point in found])
  clips = np.array([point["privacy.clip_norm"] for point in found])
  assert rates.min() >= 1e-4
  assert rates.max() <= 1
  # 5 standard deviations of a uniform mean
  assert abs(np.log10(rates).mean() + 2) < 5 * 4 / math.sqrt(12 * 4000)
  assert abs(clips.mean() - 2) < 5 * 2 / math.sqrt(12 * 4000)
  assert {point["seed"] for point in found} == set(range(9))
  assert {point["model.name"] for point in found} == {"linear", "x"}


def test_points_of_a_file_are_crossed_with_the_axes():
  found = points(listed=[{SIGMA: 1.0}, {SIGMA: 3.0}], grid=["seed=0:2"])
  assert found == [{SIGMA: s, "seed": k} for s in (1.0, 3.0) for k in (0, 1)]


@pytest.mark.parametrize(
  ("axes", "sentence"),
  [
    ({}, "the sweep has no axis; use --grid"),
    ({"grid": ["privacy.noise=1"]}, "axis 'privacy.noise' is no field that can vary; did you mean"),
    ({"grid": ["noise_multiplier=1"]}, "choose one of privacy.noise_multiplier, client_privacy."),
    ({"grid": ["clip=1"]}, "axis 'clip' is no field"),
    ({"grid": [SIGMA]}, f"axis '{SIGMA}' has no values; write NAME=VALUES"),
    ({"grid": [f"{SIGMA}="]}, "is empty; give values"),
    ({"grid": ["seed=5:5"]}, "seed=5:5 is empty"),
    ({"grid": ["seed=0:5:0"]}, "has step 0"),
    ({"grid": ["seed=0:1:2:3"]}, "has 4 parts"),
    ({"grid": ["seed=0:a"]}, "'a' is no whole number"),
    ({"grid": ["seed=1.5"]}, "'1.5' is no whole number"),
    ({"grid": [f"{SIGMA}=a"]}, "'a' is no number"),
    ({"grid": [f"{SIGMA}=nan"]}, "'nan' is no number"),
    ({"grid": [f"{SIGMA}=0:4"]}, "is a range of whole numbers; use a list, lin:"),
    ({"grid": [f"{SIGMA}=1,1"]}, "holds a value twice"),
    ({"grid": [f"{SIGMA}=1", f"{SIGMA}=2"]}, "has two axes; leave one"),
    ({"grid": [f"{RATE}=log:0:1:3"]}, "starts at 0; start log: above 0"),
    ({"grid": [f"{RATE}=lin:2:1:3"]}, "does not rise"),
    ({"grid": [f"{RATE}=lin:1:2:0"]}, "asks for 0 values"),
    ({"grid": ["model.name=lin:1:2:3"]}, "the field holds str"),
    ({"grid": ["privacy.same_noise=2"]}, "'2' is not true or false"),
    ({"grid": ["seed=0:1000", "data.seed=0:1000"]}, "the sweep has 1000000 points"),
    ({"together": ["seed=0:2", f"{SIGMA}=1"]}, "axes of --zip have 2 seed, 1 privacy"),
    ({"random": [f"{RATE}=log:1e-3:1"]}, "--random needs --trials, which is 0"),
    ({"grid": ["seed=0:2"], "trials": 3}, "--trials=3 without --random"),
    ({"listed": [{SIGMA: "high"}]}, "of a point is no float; correct the point"),
    ({"listed": [{"sigma": 1.0}]}, "axis 'sigma' is no field"),
  ],
)
def test_a_wrong_axis_is_a_sentence(axes, sentence):
  with pytest.raises(UserError) as error:
    points(**axes)
  assert sentence in str(error.value)
