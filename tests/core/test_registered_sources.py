"""What users register is named by its source, so that another one never shares a run's noise."""

import functools

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.core.sources import source_digest
from fedjax_med.federated.personal import layers_at_home, norm_layers


def coarse(step, *, rounded=None):
  return step, rounded


def digest(function):
  return source_digest(function, "transform 'mine'")


def test_a_function_is_named_by_its_file_and_the_packages_own_by_nothing():
  assert len(digest(coarse)) == 64
  assert digest(layers_at_home) == ""


@pytest.mark.parametrize(
  "other",
  [
    functools.partial(coarse, 0.5),
    functools.partial(coarse, 0.1, rounded=True),
    functools.partial(coarse, step=0.1),
    functools.partial(coarse, 0.1, rounded=layers_at_home),
    functools.partial(layers_at_home, statistics=False),
    functools.partial(layers_at_home, statistics=True),
    functools.partial(layers_at_home, chosen=norm_layers),
    coarse,
  ],
)
def test_another_argument_or_function_of_a_partial_is_another_digest(other):
  one = functools.partial(coarse, 0.1)
  assert digest(one) == digest(functools.partial(coarse, 0.1))
  assert digest(one) != digest(other)
  assert digest(other)


def test_partials_of_partials_count_every_argument():
  inner = functools.partial(coarse, 0.1)
  assert digest(functools.partial(inner, rounded=1)) == digest(
    functools.partial(coarse, 0.1, rounded=1)
  )
  assert digest(functools.partial(coarse, rounded=inner)) != digest(
    functools.partial(coarse, rounded=functools.partial(coarse, 0.5))
  )


def test_an_argument_whose_value_cannot_be_told_is_refused():
  with pytest.raises(UserError, match=r"'mine' is .* an argument of type dict.*; give it"):
    digest(functools.partial(coarse, {"step": 0.1}))
