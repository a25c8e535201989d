"""Many runs as one program: each is the run by itself."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build, run_key
from fedjax_med.run.measure import evaluated
from fedjax_med.run.replicas import Replicas, train_replicas
from fedjax_med.run.single import train_rounds


def test_seeds_in_one_program_equal_the_single_runs(tmp_path):
  config = get_config()
  config.model.name, config.server.num_rounds = "linear", 4
  hospitals = load_hospitals(config)
  experiment = build(config, hospitals)
  seeds = (0, 3, 5)
  keys = jax.numpy.stack([run_key(experiment, seed) for seed in seeds])
  indices = np.asarray(experiment.clients.indices)
  runs = Replicas(np.array(seeds, np.int32), keys, np.stack([indices] * len(seeds)))
  for seed, weights in zip(seeds, train_replicas(experiment, runs), strict=True):
    single = build(dataclasses.replace(config, seed=seed), hospitals)
    folder = tmp_path / str(seed)
    folder.mkdir()
    outcome = train_rounds(single, folder)
    expected = evaluated(single.program.parts, outcome.state)
    assert expected.state.size == 0
    chex.assert_trees_all_close(weights, jax.device_get(expected), rtol=2e-5, atol=1e-6)
  hyper = experiment.hyper._replace(client_learning_rate=jax.numpy.float32(np.inf))
  wild = experiment._replace(hyper=hyper)
  with pytest.raises(UserError, match=r"run 1 of 3 at once: a weight became NaN .*; lower client"):
    train_replicas(wild, runs)
