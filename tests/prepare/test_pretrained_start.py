"""A run that starts from a file: its initial weights, its id, and what training leaves alone."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.smoke import get_config
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.federated.vector import unravel
from fedjax_med.models.networks.pretrained import load_safetensors, overlay
from fedjax_med.prepare.experiment import build
from fedjax_med.report import reported_run as runs
from fedjax_med.trained import loading
from tests.models.state_dicts import MICRO, entries, numbered


def save(path, seed):
  """A file for se_resnext_micro: random weights, positive variances."""
  rng = np.random.default_rng(seed)
  arrays = numbered(entries("timm", **MICRO, channels=3, classes=1000))
  for key, array in arrays.items():
    spread = 1 / np.sqrt(max(1, np.prod(array.shape[1:])))
    if array.dtype == np.float32:
      arrays[key] = rng.normal(0, spread, array.shape).astype(np.float32)
    if key.endswith("running_var"):
      arrays[key] = rng.uniform(0.5, 2, array.shape).astype(np.float32)
  save_file(arrays, path)
  return str(path)


def starting_from(path, seed=0):
  config = get_config()  # of a small network, which validate would refuse: it has no real file
  model = dataclasses.replace(config.model, norm="frozen_batch", pretrained=path)
  server = dataclasses.replace(config.server, num_rounds=2)
  return dataclasses.replace(config, model=model, server=server, seed=seed)


@pytest.fixture(scope="module")
def hospitals():
  return load_hospitals(get_config())


def test_a_run_starts_from_the_file_with_a_head_of_its_seed(hospitals, tmp_path):
  path = save(tmp_path / "weights.safetensors", 1)
  first, second = (build(starting_from(path, seed), hospitals) for seed in (0, 1))
  (params, state), (other, _) = (
    run.program.parts.spec.trees(server.params, server.state)
    for run in (first, second)
    for server in [run.program.initial().server]
  )
  expected = overlay(path, params, state)
  found = {layer: leaves for layer, leaves in params.items() if layer != "head"}
  chex.assert_trees_all_equal((found, state), (expected.params, expected.state))
  same = {layer: leaves for layer, leaves in other.items() if layer != "head"}
  chex.assert_trees_all_equal(same, found)
  assert (other["head"]["kernel"] != params["head"]["kernel"]).any()


@pytest.mark.slow
def test_another_file_is_another_run_and_another_place_is_not(hospitals, tmp_path):
  path = save(tmp_path / "weights.safetensors", 1)
  moved = save(tmp_path / "moved.safetensors", 1)
  other = save(tmp_path / "other.safetensors", 2)
  ids = [build(starting_from(p), hospitals).run_id for p in (path, moved, other, "")]
  assert ids[0] == ids[1]
  assert len(set(ids)) == 3


@pytest.mark.slow
def test_private_training_moves_scales_and_leaves_the_statistics_bit_for_bit(tmp_path):
  path = save(tmp_path / "weights.safetensors", 1)
  config = starting_from(path)
  experiment = build(config, load_hospitals(config))
  program = experiment.program
  start = jax.tree.map(np.asarray, program.initial().server)
  arguments = (experiment.clients, experiment.pool, experiment.hyper, experiment.key)
  state, _ = program.block(program.initial(), *arguments, np.int32(2))
  chex.assert_trees_all_equal(state.server.state, start.state)
  moved = np.asarray(state.server.params) != start.params
  layers = unravel(moved, program.parts.spec.params)
  assert all(leaf.any() for leaf in jax.tree.leaves(layers))


@pytest.mark.slow
def test_a_run_says_what_it_started_from(tmp_path, capsys):
  path = save(tmp_path / "weights.safetensors", 1)
  runs.run(starting_from(path), tmp_path / "run", "smoke", "test")
  sha = load_safetensors(path).sha256[:12]
  assert f"SHA-256 {sha}" in " ".join(capsys.readouterr().out.split())
  notes = json.loads((tmp_path / "run" / "config.json").read_text())["notes"]
  assert any(sha in note and "outside the privacy statement" in note for note in notes)
  (tmp_path / "weights.safetensors").unlink()  # a run that has ended needs its own folder only
  assert loading.load(tmp_path / "run").stem_pool_padding == "around"
