"""Inversion: inputs come back from a gradient, and not from what protects them."""

import functools
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fedjax_med.audit import compressed, first_updates, inversion
from fedjax_med.audit.first_updates import Federation
from fedjax_med.audit.gradient_inversion import (
  Search,
  cosine_distance,
  exact_inputs,
  labels_of,
  make_matching,
  total_variation,
)
from fedjax_med.audit.learned_inversion import features_of, fit
from fedjax_med.audit.likeness import correlations, named, psnr, ssim
from fedjax_med.core.config import ClientConfig, Config, ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.data.modality import PICTURES
from fedjax_med.federated.algorithm import Pool
from fedjax_med.federated.vector import network_spec, ravel, unravel
from fedjax_med.models.registry import create_model
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.tasks.classification import CLASSIFICATION
from tests.command import smoke

SIDE = 6
COUNTS = (30, 8, 8)


@functools.cache
def federation(name: str = "linear", side: int = SIDE) -> Federation:
  """Three hospitals with 46 images of noise."""
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (sum(COUNTS), side, side, 1)).astype(np.uint8)
  labels = np.arange(len(images)) % 3
  config = Config(model=ModelConfig(name=name), client=ClientConfig(learning_rate=0.5))
  model = create_model(config.model, 3, "matmul")
  params, state = model.init(base_key(1), jnp.zeros((1, side, side, 1)))
  ends = np.cumsum(COUNTS)
  return Federation(
    config=config,
    model=model,
    spec=network_spec(params, state),
    params=ravel(params),
    state=ravel(state),
    task=CLASSIFICATION,
    modality=PICTURES,
    loss=CLASSIFICATION.loss(0.0),
    pool=Pool(jnp.asarray(images), jnp.asarray(labels, jnp.int32)),
    rows=[np.arange(end - n, end) for n, end in zip(COUNTS, ends, strict=True)],
    key=base_key(2),
  )


def layer(of: Federation, gradient: jax.Array, name: str = "head") -> tuple[np.ndarray, np.ndarray]:
  values = unravel(gradient, of.spec.params)[name]
  return np.asarray(values["kernel"]), np.asarray(values["bias"])


def read(of: Federation, observed: first_updates.Observed, *rows: int, seed: int = 0) -> jax.Array:
  return jax.jit(observed)(jnp.asarray(rows, jnp.int32), jax.random.key(seed))


def names_right(of: Federation, observed: first_updates.Observed, rows: np.ndarray) -> float:
  """Share of the records ``rows`` that the attack on a linear network names."""
  keys = jax.random.split(jax.random.key(5), len(rows))
  many = jax.jit(lambda each: jax.lax.map(lambda one: observed(*one), each))
  gradients = many((jnp.asarray(rows, jnp.int32)[:, None], keys))
  held = np.asarray(of.inputs(of.rows[0]))
  right = [
    named(correlations(exact_inputs(*layer(of, gradient), 1), held), 1)[0] == row
    for row, gradient in zip(rows, gradients, strict=True)
  ]
  return float(np.mean(right))


def test_an_unprotected_update_is_the_gradient_by_hand():
  of = federation()
  x, y = np.asarray(of.inputs(np.array([4]))).reshape(1, -1), np.eye(3)[[int(of.pool.labels[4])]]
  params, _ = of.spec.trees(of.params, of.state)
  logits = x @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
  p = np.exp(logits) / np.exp(logits).sum()
  kernel, bias = layer(of, read(of, first_updates.unprotected(of), 4))
  np.testing.assert_allclose(kernel, x.T @ (p - y), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(bias, (p - y)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "first"), [("linear", "head"), ("mlp", "hidden1")])
def test_the_first_layer_gives_a_single_record_exactly(name, first):
  of = federation(name)
  for row in (0, 7):
    kernel, bias = layer(of, read(of, first_updates.unprotected(of), row), first)
    made = exact_inputs(kernel, bias, 1)
    record = np.asarray(of.inputs(np.array([row]))).reshape(1, -1)
    np.testing.assert_allclose(made, record, atol=2e-4)
    held = np.asarray(of.inputs(of.rows[0]))
    assert named(correlations(made, held), 1)[0] == row


def test_every_record_is_identified_without_protection_and_in_eight_bits():
  of = federation()
  rows = of.rows[0][:10]
  assert names_right(of, first_updates.unprotected(of), rows) == 1
  assert names_right(of, first_updates.compressed(of, compressed.int8), rows) == 1


def test_a_column_without_bias_gives_the_input_up_to_sign_and_size():
  x = np.random.default_rng(1).normal(size=20)
  made = exact_inputs(np.outer(x, [0.0, -2.0]), np.zeros(2), 1)
  assert np.isclose(np.abs(correlations(made, x[None])), 1).all()
  assert correlations(made, x[None]).max() > 0.999


def test_a_unit_that_is_active_for_one_record_alone_gives_it_out_of_a_batch():
  x = np.random.default_rng(2).normal(size=(2, 9))
  active = np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.5]])  # of each record at three units
  made = exact_inputs(x.T @ active, active.sum(0), 2)
  assert {tuple(row.round(6)) for row in x} <= {tuple(row.round(6)) for row in made} | {
    tuple(row.round(6)) for row in exact_inputs(x.T @ active, active.sum(0), 3)
  }


def test_labels_follow_from_the_gradient_of_the_bias():
  random = np.random.default_rng(3)
  for count in (1, 2, 5, 8):
    labels = np.sort(random.integers(0, 4, count))
    p = random.dirichlet(np.full(4, 200.0), count)  # about even, as at initial weights
    bias = (p - np.eye(4)[labels]).mean(0)
    assert labels_of(bias, p.mean(0), count).tolist() == labels.tolist()


def test_labels_of_noise_are_as_many_as_records():
  bias = np.random.default_rng(4).normal(size=3) * 10
  assert len(labels_of(bias, np.full(3, 1 / 3), 7)) == 7


def test_eight_bits_are_within_a_level_and_top_k_sends_the_largest():
  update = np.random.default_rng(5).normal(size=1300).astype(np.float32)
  sent = np.asarray(compressed.int8(jnp.asarray(update), jax.random.key(0)))
  for start in range(0, 1300, 512):
    part = slice(start, start + 512)
    assert np.abs(sent[part] - update[part]).max() <= np.abs(update[part]).max() / 127 * 1.0001
  few = np.asarray(compressed.top_k(jnp.asarray(update), jax.random.key(0)))
  largest = np.sort(np.argsort(-np.abs(update))[:13])
  assert np.flatnonzero(few).tolist() == largest.tolist()
  np.testing.assert_array_equal(few[largest], update[largest])


def test_the_sum_of_three_hospitals_is_the_mean_of_their_gradients_and_no_single_record():
  of = federation()
  plain = first_updates.unprotected(of)
  rows = [0, int(of.rows[1][0]), int(of.rows[2][0])]
  total = read(of, first_updates.summed(of, 3), *rows)
  mean = sum(np.asarray(read(of, plain, row)) for row in rows) / 3
  np.testing.assert_allclose(np.asarray(total), mean, atol=1e-6)
  made = exact_inputs(*layer(of, total), 1)
  records = np.asarray(of.inputs(np.array(rows)))
  assert np.abs(correlations(made, records)).max() < 0.95


def test_a_private_update_is_the_clipped_gradient_and_noise_of_the_mechanism():
  of = federation()
  silent = PoissonGaussian(30, 0.2, 20, 0.0, 0.1)
  noisy = PoissonGaussian(30, 0.2, 20, 2.0, 0.1)
  gradient = np.asarray(read(of, first_updates.unprotected(of), 3), np.float64)
  without = np.asarray(read(of, first_updates.private(of, silent), 3))
  np.testing.assert_allclose(without, gradient * 0.1 / np.linalg.norm(gradient), atol=1e-5)
  observed = first_updates.private(of, noisy)
  noise = [np.asarray(read(of, observed, 3, seed=seed)) - without for seed in range(20)]
  count = np.size(noise)
  assert abs(np.std(noise) - 0.2) < 4 * 0.2 / np.sqrt(2 * count)
  assert abs(np.mean(noise)) < 4 * 0.2 / np.sqrt(count)


def test_noise_of_dp_sgd_hides_which_record_it_was():
  of = federation()
  rows, mechanism = of.rows[0], PoissonGaussian(30, 0.2, 20, 1.0, 0.1)
  share, chance = names_right(of, first_updates.private(of, mechanism), rows), 1 / len(rows)
  error = np.sqrt(chance * (1 - chance) / len(rows))
  assert share <= 2 * chance + 3 * error


def test_the_cosine_objective_has_the_slope_of_finite_differences():
  of = federation("mlp")
  gradient_of = first_updates.attacker_gradient(of)
  labels = jnp.array([1], jnp.int32)
  target = gradient_of(of.inputs(np.array([1])), labels)

  @jax.jit
  def objective(x):
    return cosine_distance(gradient_of(x, labels), target) + 0.01 * total_variation(x)

  x = jax.random.normal(jax.random.key(0), (1, SIDE, SIDE, 1))
  way = jax.random.normal(jax.random.key(1), x.shape)
  slope, step = float((jax.grad(objective)(x) * way).sum()), 3e-4
  differences = float((objective(x + step * way) - objective(x - step * way)) / (2 * step))
  assert np.isclose(slope, differences, rtol=0.05, atol=2e-3)
  assert float(objective(of.inputs(np.array([1])))) < float(objective(x))


def test_cosine_and_variation_against_numpy():
  random = np.random.default_rng(6)
  a, b = random.normal(size=(2, 12)).astype(np.float32)
  found = {"x": jnp.asarray(a[:5]), "y": jnp.asarray(a[5:])}
  target = {"x": jnp.asarray(b[:5]), "y": jnp.asarray(b[5:])}
  due = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  np.testing.assert_allclose(float(cosine_distance(found, target)), due, rtol=1e-5)
  image = random.normal(size=(2, 4, 5, 1)).astype(np.float32)
  due = (
    np.abs(image[:, 1:] - image[:, :-1]).mean() + np.abs(image[:, :, 1:] - image[:, :, :-1]).mean()
  )
  np.testing.assert_allclose(float(total_variation(jnp.asarray(image))), due, rtol=1e-5)


def test_the_search_finds_the_record_of_a_linear_network():
  of = federation()
  run = make_matching(
    first_updates.attacker_gradient(of),
    (1, SIDE, SIDE, 1),
    "image",
    Search(steps=400, restarts=2, variation=0.0, coarse=1),
  )
  target = unravel(read(of, first_updates.unprotected(of), 5), of.spec.params)
  labels = jnp.array([int(of.pool.labels[5])], jnp.int32)
  made, _ = jax.jit(run)(target, labels, jax.random.key(0))
  assert correlations(np.asarray(made), np.asarray(of.inputs(np.array([5]))))[0, 0] > 0.95


def test_ridge_is_the_normal_equations_and_recovers_a_linear_map():
  random = np.random.default_rng(7)
  features, weights = random.normal(size=(40, 6)), random.normal(size=(6, 3))
  inputs = features @ weights + 1
  learned = fit(features, inputs)
  np.testing.assert_allclose(learned.inputs(features[:4]), inputs[:4], atol=0.02)
  noisy = fit(features, random.normal(size=(40, 3)))
  assert np.abs(noisy.dual).max() < np.abs(learned.dual).max() * 100


def test_features_do_not_tell_the_two_classes_of_one_direction_apart():
  gradient = np.random.default_rng(8).normal(size=(1, 7))
  bias = slice(0, 2)
  one, other = (features_of(sign * gradient, bias, (2, 5)) for sign in (1, -3))
  np.testing.assert_allclose(one, other)
  np.testing.assert_allclose(np.linalg.norm(one[:, 2:]), 1)


@pytest.mark.parametrize("shape", [(12, 15, 1), (9, 9, 3)])
def test_likeness_against_scikit_image(shape):
  random = np.random.default_rng(9)
  record = random.normal(size=shape)
  made = record + 0.3 * random.normal(size=shape)
  span = record.max() - record.min()
  due = structural_similarity(made, record, data_range=span, channel_axis=-1)
  np.testing.assert_allclose(ssim(made, record), due, rtol=1e-9)
  np.testing.assert_allclose(
    psnr(made, record), peak_signal_noise_ratio(record, made, data_range=span), rtol=1e-9
  )
  assert psnr(record, record) == 200
  assert np.isclose(ssim(record, record), 1)


def test_correlations_are_those_of_numpy_and_a_constant_has_none():
  random = np.random.default_rng(10)
  made, records = random.normal(size=(2, 8)), random.normal(size=(3, 8))
  np.testing.assert_allclose(correlations(made, records), np.corrcoef(made, records)[:2, 2:])
  assert not correlations(np.ones((1, 8)), records).any()


def test_an_attacker_names_as_many_records_as_a_batch_has_and_each_once():
  similar = np.array([[0.9, 0.8, 0.1, 0.0], [0.85, 0.2, 0.3, 0.0]])
  assert named(similar, 1).tolist() == [0]
  assert named(similar, 2).tolist() == [0, 2]  # the second cannot name the first's
  assert named(similar, 3).tolist() == [0, 2, 1]
  assert named(similar[:1], 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
  ("task", "modality", "name", "settings", "sentence"),
  [
    ("survival", "table", "linear", {}, "the task is 'survival'"),
    ("classification", "series", "cnn1d", {}, "searches for pictures, and these are of"),
    ("classification", "table", "linear", {"records": 21}, "which has 20 training records"),
    ("classification", "table", "mlp", {"batches": ()}, "--batch_sizes= must be from 1 to"),
    ("classification", "pictures", "cnn_small", {"search": Search(steps=0)}, "--steps=0 leaves"),
  ],
)
def test_what_the_attack_is_not_defined_for_is_refused(task, modality, name, settings, sentence):
  config: Any = Config(model=ModelConfig(name=name))
  hospitals: Any = SimpleNamespace(
    dataset=SimpleNamespace(task=task, modality=modality),
    train=SimpleNamespace(counts=np.array([20, 20])),
    names=("one", "two"),
  )
  with pytest.raises(UserError, match=re.escape(sentence)):
    inversion.require_attackable(config, hospitals, inversion.Settings(**settings))
  fine = SimpleNamespace(
    **{**vars(hospitals), "dataset": SimpleNamespace(task="classification", modality="series")}
  )
  other: Any = fine
  inversion.require_attackable(Config(model=ModelConfig(name="mlp")), other, inversion.Settings())


audit = functools.partial(smoke, ("-m", "fedjax_med.audit"))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--attack=nonsense"], "--attack='nonsense' is unknown"),
    (["--records=3"], "--records is read with --attack=inversion only"),
    (["--attack=inversion", "--trials=2000"], "--trials is read with --attack=planted only"),
    (["--attack=inversion", "--steps=4"], "--steps is read with a network whose inputs are"),
    (["--attack=inversion", "--records=900"], "--records=900 of hospital 'hospital 1', which has"),
    (["--attack=inversion", "--batch_sizes=9"], "--batch_sizes=9 must be from 1 to --records=8"),
    (["--attack=inversion", "--batch_sizes=a"], "--batch_sizes=a must be whole numbers"),
    (["--attack=inversion", "--show_patients"], "--show_patients is read where reconstructed"),
  ],
)
def test_what_is_refused_is_refused_in_one_sentence(arguments, sentence):
  result = audit(*arguments)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {sentence}")
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


@pytest.mark.slow
def test_the_command_writes_numbers_and_a_figure_of_phantoms(tmp_path):
  out = tmp_path / "out"
  result = audit("--attack=inversion", "--records=4", "--batch_sizes=1,2", f"--out={out}", "--json")
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert found == json.loads((out / "inversion.json").read_text(encoding="utf-8"))
  first = found["ways"][0]
  assert first["identified"]["mean"] == 1
  assert first["correlation"]["mean"] > 0.99
  assert [way["name"] for way in found["ways"]][-2:] == ["DP-SGD, ε = 8", "DP-SGD, ε = 1"]
  assert (out / "inversion.png").stat().st_size > 1000
