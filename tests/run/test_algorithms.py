"""Whole runs with every algorithm: what is measured is the model that each hospital would use."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import PrivacyConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.registry import ALGORITHMS, require_rules
from fedjax_med.federated.vector import unravel
from fedjax_med.models.registry import create_model
from fedjax_med.prepare.experiment import build
from fedjax_med.run.single import train_rounds
from fedjax_med.run.summaries import summary_record
from fedjax_med.tasks.classification import classification_metrics
from fedjax_med.trained import loading
from fedjax_med.trained.exporting import describe
from fedjax_med.trained.predictions import make_probabilities
from tests.running import run, smoke_config
from tests.sweep.sweeping import sweep

QUICK = {"fedper"}
OWN = ("fedbn", "fedper", "finetune", "ditto")
PLAIN = {"privacy": PrivacyConfig()}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALGORITHMS]


def config_for(name, **changes):
  model = "cnn_small" if name == "fedbn" else "mlp"
  private = {} if ALGORITHMS[name].records else PLAIN
  return smoke_config(
    **{"server__algorithm": name, "model__name": model, "server__num_rounds": 2},
    **private,
    **changes,
  )


def own_weights(name, state, spec, k):
  """The model of hospital ``k``, put together by hand from what the run keeps."""
  own = jax.tree.map(lambda leaf: leaf[k], state.client_states)
  if name == "ditto":
    return unravel(own[1], spec)
  params = unravel(state.server.params, spec)
  layers = {"fedper": ["head"], "finetune": ["head"], "fedbn": ["norm1", "norm2"]}.get(name, [])
  start = 0
  for layer in layers:
    for leaf in sorted(params[layer]):  # the order of a dictionary's leaves in a vector
      shape = params[layer][leaf].shape
      params[layer][leaf] = own[1][start : start + math.prod(shape)].reshape(shape)
      start += math.prod(shape)
  return params


@pytest.mark.parametrize("name", CASES)
def test_every_hospital_is_measured_on_its_own_images_with_the_model_it_would_use(name, tmp_path):
  config = config_for(name)
  hospitals = load_hospitals(config)
  experiment = build(config, hospitals)
  outcome = train_rounds(experiment, tmp_path)
  model = create_model(config.model, len(hospitals.dataset.class_names))
  spec = experiment.program.parts.spec
  found = []
  for k, rows in enumerate(client_rows(hospitals.test)):
    params = own_weights(name, outcome.state, spec.params, k)
    images = normalise(jnp.asarray(hospitals.dataset.inputs[rows]), config.data.normalisation)
    logits = model.apply(params, unravel(outcome.state.server.state, spec.state), images)[0]
    found.append(np.asarray(jax.nn.softmax(logits)))
    expected = classification_metrics(found[-1], hospitals.dataset.labels[rows])
    for key in ("n", "loss", "accuracy"):
      assert outcome.last.clients[k][key] == pytest.approx(expected[key], rel=1e-4)
  np.testing.assert_allclose(outcome.last.probabilities, np.concatenate(found), atol=1e-5)
  summary = summary_record(experiment, outcome, "smoke")
  assert summary["predicts"] == ("own models" if name in OWN else "global model")


def test_bytes_are_those_of_what_travels(tmp_path):
  sizes = {}
  for name in ("fedavg", "fedper", "scaffold", "fednova"):
    config = config_for(name, **PLAIN)
    experiment = build(config, load_hospitals(config))
    spec = experiment.program.parts.spec.params
    head = sum(
      size for leaf, size in zip(spec.names, spec.sizes, strict=True) if leaf[:5] == "head/"
    )
    sizes[name] = experiment.program.parts.message
  whole = sizes["fedavg"][0]
  assert sizes["fedavg"] == (whole, whole)
  assert sizes["fedper"] == (whole - 4 * head, whole - 4 * head)
  assert sizes["scaffold"] == (2 * whole, 2 * whole)
  assert sizes["fednova"] == (whole, whole + 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedper", "scaffold", "ditto"])
def test_a_point_of_a_sweep_equals_the_run_by_itself(name, tmp_path):
  pull = {"server.personal_weight": 0.5} if name == "ditto" else {}
  points: list = [{"seed": 0}, {"seed": 3, **pull}]
  config = config_for(name)
  table = sweep(tmp_path / "sweep", points, config)
  changes = {path.replace(".", "__"): value for path, value in pull.items()}
  alone = run(tmp_path / "alone", **vars_of(config), seed=3, **changes)
  found = table[table["seed"] == 3]
  expected = {row["name"]: row["loss"] for row in alone["clients"]}
  assert len(found) == len(expected)
  for _, row in found.iterrows():
    assert row["loss"] == pytest.approx(expected[row["hospital"]], rel=1e-4)


def vars_of(config):
  names = ("algorithm", "num_rounds")
  values = {f"server__{name}": getattr(config.server, name) for name in names}
  return {**values, "model__name": config.model.name, "privacy": config.privacy}


@pytest.mark.slow
def test_the_report_speaks_of_the_hospitals_own_models(tmp_path):
  run(tmp_path, server__algorithm="fedper", model__name="mlp", eval__local_baselines=True)
  text = " ".join((tmp_path / "report.html").read_text().replace("&#39;", "'").split())
  assert "the hospitals' own models reach AUROC" in text
  assert "<caption>The hospitals' own models after round" in text
  assert "global model reaches" not in text
  assert "Confusion matrix of the global" not in text


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"server__algorithm": "scaffold", "client__optimizer": "adam"}, "mean gradients only after"),
    ({"server__algorithm": "fednova", "client__optimizer": "adam"}, "SGD and momentum only"),
    ({"server__algorithm": "scaffold", "server__proximal_weight": 0.1}, "sum of gradients"),
    ({"server__personal_layers": "head("}, "personal_layers='head\\(' is no regular"),
    ({"server__personal_weight": -1.0}, "server.personal_weight=-1.0 must be at least 0"),
  ],
)
def test_settings_that_an_algorithm_cannot_mean_are_refused(changes, sentence):
  config = smoke_config(**changes)
  check = validate if "personal" in sentence else require_rules
  with pytest.raises(UserError, match=sentence):
    check(config)


def test_shadow_runs_are_refused_where_hospitals_predict_with_their_own_models():
  from fedjax_med.audit.shadow_models import prepare

  config = config_for("fedper")
  with pytest.raises(UserError, match="attacks the global model"):
    prepare(config, load_hospitals(config), 4, 0)


@pytest.mark.parametrize("name", ["fedbn", "fedper"])
def test_a_global_model_that_lacks_layers_is_not_handed_out(name, finished, tmp_path):
  record = json.loads((finished / "config.json").read_text())
  record["config"]["server"]["algorithm"] = name
  (tmp_path / "config.json").write_text(json.dumps(record))
  shutil.copy(finished / "hospitals.json", tmp_path)
  with pytest.raises(UserError, match=r"lacks the layers .*; say whose model is meant, such as"):
    loading.load(tmp_path)


def test_the_one_model_of_all_hospitals_belongs_to_none(finished):
  with pytest.raises(UserError, match="all hospitals have the same model; leave out --hospital"):
    loading.load(finished, hospital="hospital 1")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OWN],
)
def test_the_model_of_a_hospital_is_handed_out_as_it_was_measured(name, tmp_path):
  config = config_for(name)
  summary = run(tmp_path, **vars_of(config))
  hospitals = load_hospitals(config)
  for k, (hospital, rows) in enumerate(
    zip(hospitals.names, client_rows(hospitals.test), strict=True)
  ):
    model = loading.load(tmp_path, hospital=hospital)
    probabilities = make_probabilities(model)(hospitals.dataset.inputs[rows])
    found = classification_metrics(probabilities, hospitals.dataset.labels[rows])
    for key in ("n", "loss", "accuracy"):
      assert summary["clients"][k][key] == pytest.approx(found[key], rel=1e-4)
    described = describe(model, json.loads((tmp_path / "privacy.json").read_text()))
    assert described["hospital"] == hospital
    assert model.described.endswith(hospital)
  with pytest.raises(UserError, match=r"--hospital='hospital 9' is unknown; did you mean"):
    loading.load(tmp_path, hospital="hospital 9")
