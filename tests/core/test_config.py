"""The configuration's rules: every wrong value is a sentence with value, rule and remedy."""

import doctest

import pytest

from configs import smoke
from fedjax_med.core import fields
from fedjax_med.core.config import (
  Config,
  declared,
  fingerprint,
  flat,
  get_field,
  nested,
  set_field,
  to_dict,
)
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import REFUSED, validate

FIELDS = declared()
NUMBERS = [path for path, field in FIELDS.items() if field.bounds is not None]
NAMES = [path for path, field in FIELDS.items() if field.choices]


def with_value(path: str, value, config: Config | None = None) -> Config:
  config = smoke.get_config() if config is None else config
  set_field(config, path, value)
  return config


@pytest.mark.parametrize("path", NUMBERS)
def test_values_below_and_above_their_range_are_refused_with_a_remedy(path):
  bounds = FIELDS[path].bounds
  assert bounds is not None
  low, high, low_allowed, remedy = bounds
  kind = FIELDS[path].kind
  wrong = [kind(low) - 1 if low_allowed else kind(low), float("inf"), float("nan")]
  wrong += [] if high == float("inf") else [kind(high) + 1]
  for value in wrong:
    with pytest.raises(UserError) as caught:
      validate(with_value(path, value))
    assert str(caught.value).startswith(f"{path}={value} must be ")
    assert str(caught.value).endswith(f"; {remedy}")


@pytest.mark.parametrize("path", NAMES)
def test_unknown_choices_are_answered_with_the_nearest(path):
  right = FIELDS[path].choices[-1]
  with pytest.raises(UserError, match=f"{path}='{right}x' is unknown; did you mean '{right}'"):
    validate(with_value(path, right + "x"))


def test_every_number_has_a_range_and_every_name_its_choices_unless_a_registry_has_them():
  free = {"data.path", "data.cache_dir", "data.patient_pattern", "model.name", "server.algorithm"}
  free |= {"server.personal_layers", "data.layout", "data.positive", "data.window", "data.columns"}
  free |= {"data.fold", "data.target_columns", "data.signals", "data.time_column", "data.ranges"}
  free |= {"data.test_persons", "attack.hospitals"}
  free |= {"execution.compilation_cache", "model.pretrained", "data.source"}
  free |= {"cost.uplink_mbps", "cost.downlink_mbps", "cost.client_speed"}
  free |= {"server.aggregator", "server.transforms", "data.group_columns", "data.slices"}
  free |= {f"data.{name}" for name in ("time_column", "signals", "ranges", "test_persons")}
  free |= {f"data.{role}_column" for role in ("path", "label", "patient", "site", "split")}
  bare = {path for path, field in FIELDS.items() if not field.choices and field.bounds is None}
  assert {path for path in bare if FIELDS[path].kind is not bool} == free
  assert [path for path in NUMBERS if FIELDS[path].kind not in (int, float)] == []
  assert [path for path in NAMES if FIELDS[path].kind is not str] == []


def test_every_default_is_in_its_range_and_one_of_its_choices():
  for path, field in FIELDS.items():
    assert get_field(Config(), path) == field.default
    assert not field.choices or field.default in field.choices, path
    if field.bounds is not None:
      assert field.bounds.low <= field.default <= field.bounds.high, path


def test_the_example_of_a_declaration_is_true():
  outcome = doctest.testmod(fields)
  assert outcome.attempted > 0
  assert outcome.failed == 0


def test_every_part_of_the_configuration_is_declared_in_its_order():
  assert list(FIELDS) == list(flat(to_dict(Config())))
  assert nested(flat(to_dict(Config()))) == to_dict(Config())


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"data.source": "folder"}, "data.source='folder' needs data.path"),
    ({"partition.num_clients": 0}, "partition.num_clients=0 is under 1"),
    ({"partition.num_clients": 1}, "num_clients=1 with privacy.mechanism: training on pooled data"),
    ({"execution.layout": "chunk"}, "chunk_size=0 says not how many at once; set --config.exec"),
    (
      {"execution.chunk_size": 2},
      "with execution.layout=chunk only, and it is 'auto'; use --config",
    ),
    ({"execution.layout": "scan", "execution.probe": "on"}, "probe='on' is read with execution.l"),
    ({"execution.microbatch": 4, "model.norm": "batch"}, "microbatch=4 with model.norm='batch'"),
    ({"privacy.mechanism": "none"}, "leave privacy.noise_multiplier at 0"),
    ({"privacy.noise_multiplier": 0.0}, "neither privacy.noise_multiplier nor"),
    ({"model.norm": "batch"}, "use model.norm=group or model.norm=frozen_batch"),
    ({"model.dtype": "bfloat16", "privacy.clipping": "two_pass"}, "or model.dtype=float32"),
    ({"model.pretrained": "w", "model.norm": "frozen_batch"}, "no weights for model.name='se_res"),
    ({"model.pretrained": "w", "model.name": "se_resnext50_32x4d"}, "with model.norm='group'; use"),
    ({"data.fold": "6/5"}, "data.fold='6/5' is not K/F, part K of F from 1/F to F/F; use 1/5 to"),
    (
      {"data.source": "table", "data.path": "x", "data.scaling": "hospital"},
      "data.scaling='hospital' with privacy.mechanism='dp_sgd': every input of a hospital follows",
    ),
    ({"model.width": 0.0}, "model.width=0.0 must be above 0 and at most 16; use 1 for"),
    ({"privacy.unit": "patient", "data.split": "paper"}, "use data.split=grouped"),
    (
      {"privacy.rows_per_unit": 2},
      "with privacy.unit=patient or group only, and it is 'record'; use one",
    ),
    ({"privacy.augmentation_multiplicity": 4}, "set --config.client.augmentation=flip_shift"),
    ({"privacy.solve_for": "rounds"}, "solve_for='rounds' does not go with"),
    ({"privacy.solve_for": "clip_norm"}, "clip_norm takes a noise_stddev and a target_epsilon"),
    ({"privacy.noise_stddev": 2.0}, "privacy.solve_for=clip_norm only, and it is 'noise'"),
    ({"privacy.same_noise": True}, "privacy.noise_multiplier=0 only, and it is 1; use --config"),
    ({"client_privacy.noise_multiplier": 1.0}, "with client_privacy.mechanism=dp_fedavg only"),
    ({"client_privacy.mechanism": "dp_fedavg"}, "neither client_privacy.noise_multiplier nor"),
    (
      {"client_privacy.mechanism": "dp_fedavg", "client_privacy.noise_multiplier": 1.0},
      "use server.weighting=uniform with",
    ),
  ],
)
def test_values_that_contradict_each_other_are_refused(changes, sentence):
  config = smoke.get_config()
  for path, value in changes.items():
    with_value(path, value, config)
  with pytest.raises(UserError, match=sentence):
    validate(config)


def test_pretrained_weights_are_accepted_where_there_is_a_place_for_all_of_them():
  config = with_value("model.pretrained", "weights.safetensors")
  config.model.name, config.model.norm = "se_resnext50_32x4d", "frozen_batch"
  validate(config)
  config.model.width = 0.5
  with pytest.raises(UserError, match=r"model.width=0.5 with .*; use model.width=1"):
    validate(config)


@pytest.mark.parametrize(("path", "value"), REFUSED)
def test_what_epsilon_would_not_hold_with_is_refused_with_reason_and_remedy(path, value):
  with pytest.raises(UserError) as caught:
    validate(with_value(path, value))
  why, remedy = REFUSED[path, value]
  assert str(caught.value) == f"{path}='{value}' is refused: {why}; {remedy}"


def test_fingerprint_depends_on_values_not_on_order():
  assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
  assert fingerprint({"a": 1}) != fingerprint({"a": 2})
