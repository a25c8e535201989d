"""Attacks on updates against ByzFL, and hostile hospitals in runs."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import Config, declared, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.poisoning import POISONS, TARGET, hostile_hospitals, patched
from fedjax_med.exchange.aggregator import Joint, mean
from fedjax_med.exchange.attack import Scene
from fedjax_med.exchange.attacks.registry import ATTACKS, attack_strength
from fedjax_med.exchange.registry import exchange_numbers, make_exchange
from fedjax_med.exchange.robust.rules import RULES, joined_by
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.run.training import run
from fedjax_med.sweep.points import hospital_loader
from tests.exchange.test_robust import GOLDEN, presence
from tests.federated.test_conformance import rounds
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper

STRENGTH = {"ipm": 2.0, "alie": 1.5}


def scene_of(vectors, weights, hostile, strength=1.0, aggregator=None):
  aggregator = aggregator or mean()
  joint = Joint(key=KEY, last=())
  return Scene(
    weights=weights,
    hostile=hostile,
    strength=jnp.float32(strength),
    key=KEY,
    aggregate=lambda some: aggregator.finish(
      aggregator.combine(some, weights, joint), weights.sum()
    ),
  )


def message(vectors):
  """The same numbers in two places of a message."""
  return ClientDelta(params=vectors[:, :3], state=vectors[:, 3:])


def sent(name, aggregator=None, strength=1.0):
  """[cases, D] what hostile clients send, in each case of the golden file."""
  attack = ATTACKS[name]()

  def one(vectors, present, f):
    number = present.sum()
    places = jnp.arange(len(present))
    hostile = present & (places >= number - f)
    made = None if aggregator is None else aggregator(f)
    weights = jnp.where(present, 1 / number.astype(jnp.float32), 0)
    messages = message(vectors)
    after = attack(messages, scene_of(messages, weights, hostile, strength, made))
    rows = jnp.concatenate([after.params, after.state], axis=1)
    return rows, hostile

  arguments = (jnp.asarray(x) for x in (GOLDEN["vectors"], presence(), GOLDEN["f"]))
  rows, hostile = jax.device_get(jax.jit(jax.vmap(one))(*arguments))
  honest = presence() & ~hostile
  np.testing.assert_array_equal(rows[honest], GOLDEN["vectors"][honest])
  assert (hostile.sum(1) == GOLDEN["f"]).all()
  last = rows[np.arange(len(rows)), GOLDEN["n"] - 1]
  for case, mask in enumerate(hostile):  # all of them send the same
    np.testing.assert_array_equal(rows[case][mask], np.tile(last[case], (GOLDEN["f"][case], 1)))
  return last


@pytest.mark.parametrize("name", ["sign_flip", "ipm", "alie", "mimic"])
def test_an_attack_is_that_of_byzfl(name):
  found, expected = sent(name, strength=STRENGTH.get(name, 1.0)), GOLDEN[name]
  scale = np.abs(GOLDEN["vectors"]).max((1, 2))[:, None]
  np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


def trimmed(f):
  return joined_by(RULES["trimmed_mean"](Config().robust), None, f)


@pytest.mark.parametrize("kind", ["ipm", "alie"])
@pytest.mark.parametrize("rule", ["mean", "trimmed_mean"])
def test_the_strength_that_harms_a_rule_most_is_that_of_byzfl(kind, rule):
  name = f"optimal_{kind}"
  found = sent(name, trimmed if rule == "trimmed_mean" else None)
  expected = GOLDEN[f"{name}_{rule}"]
  # The search compares distances: where two strengths harm alike, rounding chooses.
  scale = np.abs(expected).max(1, keepdims=True) + np.abs(GOLDEN["vectors"]).max((1, 2))[:, None]
  same = np.isclose(found / scale, expected / scale, rtol=1e-5, atol=1e-5).all(1)
  assert same.all()


def test_normal_noise_has_the_strength_as_deviation_and_nan_is_sent_by_all():
  vectors = jnp.zeros((4, 20_000))
  hostile = jnp.asarray([False, True, True, False])
  scene = scene_of(message(vectors), jnp.full(4, 0.25), hostile, 3.0)
  after = ATTACKS["gaussian"]()(message(vectors), scene)
  np.testing.assert_array_equal(after.state[1], after.state[2])
  assert float(jnp.std(after.state[1])) == pytest.approx(3.0, rel=0.03)
  assert float(jnp.abs(after.state[0]).max()) == 0
  wrong = ATTACKS["nan"]()(message(vectors), scene)
  assert jnp.isnan(wrong.params).all(1).tolist() == hostile.tolist()


def test_an_honest_message_that_is_not_finite_tells_attackers_nothing():
  vectors = jnp.asarray([[1.0, 1, 1, 1], [3, 3, 3, 3], [jnp.nan] * 4, [7, 7, 7, 7]])
  hostile = jnp.asarray([False, False, False, True])
  weights = jnp.full(4, 0.25)
  after = ATTACKS["sign_flip"]()(message(vectors), scene_of(message(vectors), weights, hostile))
  np.testing.assert_array_equal(after.params[3], [-2.0] * 3)
  absent = scene_of(message(vectors), weights.at[0].set(0), hostile)
  np.testing.assert_array_equal(ATTACKS["mimic"]()(message(vectors), absent).params[3], [3.0] * 3)


def config_of(**changes):
  config = Config()
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return config


HOSTILE = jnp.asarray([False, True, False])
TOY = {
  "gaussian against buckets": {"attack__kind": "gaussian", "robust__pre": "bucketing"},
  "optimal_ipm against krum": {
    "attack__kind": "optimal_ipm",
    "server__aggregator": "krum",
    "robust__assumed_byzantine": 1,
  },
  "nan against centered_clipping": {
    "attack__kind": "nan",
    "server__aggregator": "centered_clipping",
  },
}


@functools.cache  # calls share compiled programs
def toy_exchange(text):
  return make_exchange(config_of(**json.loads(text)), 3)


def toy_rounds(changes, number, state=None, **settings):
  config = config_of(**changes)
  federation = make_federation(exchange=toy_exchange(json.dumps(changes)), **settings)
  numbers = {name: jnp.float32(value) for name, value in exchange_numbers(config).items()}
  hyper = make_hyper()._replace(exchange=numbers)
  clients = make_clients()._replace(hostile=HOSTILE)
  return rounds(federation, number, state=state, clients=clients, hyper=hyper)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY)
def test_hostile_rounds_agree_in_every_layout(name):
  expected, _ = toy_rounds(TOY[name], 4)
  for settings in ({"chunk": 1}, {"chunk": 2, "devices": 2}, {"chunk": 2, "cohort_cap": 3}):
    found, _ = toy_rounds(TOY[name], 4, **settings)
    chex.assert_trees_all_close(
      jax.device_get(expected), jax.device_get(found), rtol=2e-5, atol=1e-6
    )


def test_hostile_rounds_go_on_after_a_stop_bit_for_bit_and_count_what_is_not_finite():
  (name,) = [name for name in TOY if name.startswith("nan")]
  expected, _ = toy_rounds(TOY[name], 4)
  half, _ = toy_rounds(TOY[name], 2)
  resumed, _ = toy_rounds(TOY[name], 2, half)
  chex.assert_trees_all_equal(jax.device_get(expected), jax.device_get(resumed))
  assert toy_exchange(json.dumps(TOY[name])).goes_on
  assert expected.traffic.refused.tolist() == [0, 4, 0]
  assert jnp.isfinite(expected.server.params).all()


def test_an_attack_moves_the_mean_and_a_robust_rule_withstands_it():
  attacked = {"attack__kind": "ipm", "attack__strength": 20.0}

  def accuracy(**changes):
    state, _ = toy_rounds(changes, 40)
    _, last = toy_rounds(changes, 5, state)
    return float(last.clients.tally.sum() / last.clients.examples.sum())

  assert accuracy(**attacked) < 0.6
  assert accuracy(**attacked, server__aggregator="median") > 0.9


def small(**changes):
  from tests.running import smoke_config

  config = smoke_config(server__num_rounds=2, eval__every=2, privacy=Config().privacy)
  config.execution.compilation_cache = ""
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return config


def ended(config, folder):
  """summary.json and hospitals.json of a run."""
  from fedjax_med.report import reported_run

  reported_run.run(config, folder, "small", "test")
  return [
    json.loads((pathlib.Path(folder) / name).read_text("utf-8"))
    for name in ("summary.json", "hospitals.json", "config.json")
  ]


def test_scores_are_of_honest_hospitals_and_attackers_stand_apart(tmp_path):
  summary, held, config = ended(
    small(attack__kind="sign_flip", attack__number=2, server__aggregator="median"), tmp_path
  )
  clients = summary["clients"]
  assert [line.get("hostile", False) for line in clients] == [k < 2 for k in range(len(clients))]
  assert summary["test"]["n"] == sum(line["n"] for line in clients[2:])
  assert np.sum(summary["confusion"]) == summary["test"]["n"]
  assert config["exchange"]["attack"] == {
    "kind": "sign_flip",
    "hospitals": [line["name"] for line in clients[:2]],
  }
  assert "poisoned" not in held
  assert "(attack.kind=sign_flip): scores are of the others" in " ".join(config["notes"])
  statement = (tmp_path / "privacy_statement.md").read_text("utf-8")
  assert "Every hospital counts the same, whatever its weight." in statement
  assert "simulates an attack (sign_flip)" in statement


def test_flipped_labels_are_those_of_hostile_training_rows_and_are_counted(tmp_path):
  plain, flipped = small(), small(attack__kind="label_flip", attack__hospitals="")
  before, after = load_hospitals(plain), load_hospitals(flipped)
  rows = before.train.indices[0][: before.train.counts[0]]
  others = np.setdiff1d(np.arange(len(before.dataset.labels)), rows)
  labels = [each.dataset.labels for each in (before, after)]
  np.testing.assert_array_equal(labels[1][rows], 1 - labels[0][rows])
  np.testing.assert_array_equal(labels[1][others], labels[0][others])
  assert exchange_numbers(flipped) == {}
  summary, held, _ = ended(flipped, tmp_path / "flipped")
  other, clean, _ = ended(plain, tmp_path / "plain")
  assert held["poisoned"] == {before.names[0]: len(rows)}
  assert "poisoned" not in clean
  assert summary["run_id"] != other["run_id"]
  assert summary["weights_sha256"] != other["weights_sha256"]
  assert held["hospitals"][0]["test"] == clean["hospitals"][0]["test"]
  assert held["hospitals"][0]["train"] == clean["hospitals"][0]["train"][::-1]


def test_a_backdoor_is_a_patch_in_a_share_of_hostile_training_pictures_and_its_success_is_told(
  tmp_path,
):
  plain, hidden = small(), small(attack__kind="backdoor", attack__hospitals="", attack__share=0.25)
  before, after = load_hospitals(plain), load_hospitals(hidden)
  rows = before.train.indices[0][: before.train.counts[0]]
  changed = (before.dataset.inputs != after.dataset.inputs).any((1, 2, 3))
  changed |= before.dataset.labels != after.dataset.labels
  assert set(np.flatnonzero(changed)) <= set(rows)
  some = np.flatnonzero((after.dataset.inputs == patched(after.dataset.inputs)).all((1, 2, 3)))
  assert len(set(some) & set(rows)) == round(0.25 * len(rows))
  assert (after.dataset.labels[some] == TARGET).all()
  side = max(2, before.dataset.inputs.shape[1] // 8)
  corner = after.dataset.inputs[some][:, -side:, -side:]
  assert (corner == np.iinfo(corner.dtype).max).all()
  summary, held, _ = ended(hidden, tmp_path / "hidden")
  assert held["poisoned"] == {before.names[0]: round(0.25 * len(rows))}
  found = summary["backdoor"]
  honest = [r for k, r in enumerate(client_rows(before.test)) if k]
  assert found["pictures"] == sum(int((before.dataset.labels[r] != TARGET).sum()) for r in honest)
  assert 0 <= found["fooled_without_patch"] <= 1
  assert 0 <= found["fooled"] <= 1


@pytest.mark.slow
def test_a_model_of_mostly_poisoned_pictures_takes_the_patch_for_the_class(tmp_path):
  config = small(attack__kind="backdoor", attack__hospitals="", attack__number=2)
  config.server.num_rounds, config.client.num_local_steps = 20, 8
  found = ended(config, tmp_path)[0]["backdoor"]
  assert found["fooled"] > found["fooled_without_patch"] + 0.3


def test_points_of_a_sweep_tell_poisoned_labels_from_right_ones():
  load = hospital_loader()
  plain, flipped = small(), small(attack__kind="label_flip")
  two = small(attack__kind="label_flip", attack__number=2)
  sets = [load(config).dataset for config in (plain, flipped, two, plain, flipped)]
  assert sets[0] is sets[3]
  assert sets[1] is sets[4]
  assert len({id(dataset) for dataset in sets}) == 3


def test_hostile_hospitals_are_named_or_the_first_ones():
  names = ("Ahorn", "Birke", "Clara")
  named = config_of(attack__kind="ipm", attack__hospitals="Clara + Ahorn")
  assert hostile_hospitals(named, names).tolist() == [True, False, True]
  first = config_of(attack__kind="ipm", attack__number=2)
  assert hostile_hospitals(first, names).tolist() == [True, True, False]
  assert not hostile_hospitals(Config(), names).any()


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"attack__hospitals": "Bircke"}, "no hospital is called 'Bircke'; did you mean 'Birke'?"),
    ({"attack__hospitals": " + "}, "names nobody; name hospitals with . between"),
    ({"attack__hospitals": "Ahorn+Birke+Clara"}, "leaves no honest hospital to measure"),
    ({"attack__number": 3}, "attack.number=3 of 3 hospitals leaves no honest one.*; use at most 2"),
  ],
)
def test_names_and_numbers_that_do_not_fit_are_refused(changes, sentence):
  config = config_of(attack__kind="ipm", **changes)
  with pytest.raises(UserError, match=sentence):
    hostile_hospitals(config, ("Ahorn", "Birke", "Clara"))


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    (
      {"client_privacy__mechanism": "dp_fedavg"},
      "attack.kind='ipm' with client_privacy.mechanism='dp_fedavg': an update that is forged after",
    ),
    ({"secure__protocol": "grid"}, "with secure.protocol='grid': what is forged are updates, and"),
    ({"eval__local_baselines": True}, "with eval.local_baselines: hospitals by themselves have no"),
  ],
)
def test_what_no_attack_goes_with_is_refused(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    make_exchange(config_of(attack__kind="ipm", **changes), 5)
  if "local" not in sentence:  # who only trains on wrong labels does all else as it should
    make_exchange(config_of(attack__kind="label_flip", **changes), 5)


def test_strengths_are_those_of_byzfl_unless_one_is_given():
  assert attack_strength(config_of(attack__kind="ipm")) == 2
  assert attack_strength(config_of(attack__kind="alie")) == 1.5
  assert attack_strength(config_of(attack__kind="alie", attack__strength=0.5)) == 0.5
  kinds = set(declared()["attack.kind"].choices)
  assert kinds - {"none", *POISONS} == set(ATTACKS)


def test_updates_that_do_not_fit_into_memory_together_are_refused():
  config = small(server__aggregator="median", execution__memory_gib=1e-6)
  with pytest.raises(UserError, match=r"needs the updates of \d hospitals at once, .* GiB, over"):
    run(config)
