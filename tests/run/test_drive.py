"""The loop of the host, on runs that a table of numbers stands for."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.federated.algorithm import no_metrics
from fedjax_med.prepare.experiment import build
from fedjax_med.run.budget import planned_rounds
from fedjax_med.run.drive import BUDGET, COMPLETED, DIVERGED, Reached, drive, has_diverged
from fedjax_med.run.measure import evaluation_rows
from fedjax_med.simulation.rounds import NEVER, BlockMetrics
from tests.running import smoke_config


@pytest.fixture(scope="module")
def experiment():
  config = smoke_config(server__num_rounds=6, eval__every=2)
  return build(config, load_hospitals(config))


def with_rounds(experiment, rounds, **privacy):
  """The same run with other rounds, and a budget where one is given."""
  config = experiment.config
  config = dataclasses.replace(
    config,
    server=dataclasses.replace(config.server, num_rounds=rounds),
    privacy=dataclasses.replace(config.privacy, **privacy),
  )
  return experiment._replace(case=experiment.case._replace(config=config))


class Table:
  """Runs that take the rounds they are told to, and lose a prediction or a weight at one of them.

  Attributes:
    asked: the rounds of every call.
  """

  def __init__(self, runs, bad_prediction=None, bad_weight=None):
    self.runs, self.bad_prediction, self.bad_weight = runs, bad_prediction, bad_weight
    self.rounds, self.asked = np.zeros(len(runs), int), []

  def __call__(self, lengths):
    self.asked.append(lengths.tolist())
    self.rounds += lengths
    return [self._reached(k, run) for k, run in enumerate(self.runs)]

  def _reached(self, k, run):
    clients, done = len(run.names), int(self.rounds[k])
    probabilities = np.full((len(evaluation_rows(run)), 2), 0.5, np.float32)
    if (k, done) == self.bad_prediction:
      probabilities[0] = np.nan
    bad_round = jax.numpy.full(clients, NEVER)
    if (k, done) == self.bad_weight:
      bad_round = bad_round.at[1].set(done - 1)
    metrics = BlockMetrics(no_metrics((clients,)), bad_round)
    return Reached(
      rounds=done,
      steps=run.steps * done,
      metrics=jax.device_get(metrics) if done else None,
      probabilities=probabilities,
    )


def test_runs_stop_at_their_log_points_until_each_has_ended(experiment):
  runs = [with_rounds(experiment, 5), with_rounds(experiment, 3)]
  table, seen = Table(runs), []

  def log(k, point, reached):
    seen.append((k, point.rounds, reached.stopped, max(point.epsilons) > 0))

  assert drive(runs, table, log) == [COMPLETED, COMPLETED]
  assert table.asked == [[0, 0], [2, 2], [2, 1], [1, 0]]
  assert seen == [
    (0, 0, "", False),
    (1, 0, "", False),
    (0, 2, "", True),
    (1, 2, "", True),
    (0, 4, "", True),
    (1, 3, COMPLETED, True),
    (0, 5, COMPLETED, True),
  ]


def test_epsilon_at_the_end_is_that_of_the_last_log_point_alone(experiment):
  points = []
  drive([experiment], Table([experiment]), lambda *a: points.append(a[1]), epsilon_at_end=True)
  assert [point.epsilons == () for point in points] == [True, True, True, False]
  always = []
  drive([experiment], Table([experiment]), lambda *a: always.append(a[1]))
  assert always[-1].epsilons == points[-1].epsilons


def test_a_budget_ends_a_run_before_it_is_crossed(experiment):
  run = with_rounds(experiment, 50, target_epsilon=6.0)
  table = Table([run])
  assert drive([run], table, lambda *_: None) == [BUDGET]
  assert sum(lengths[0] for lengths in table.asked) == planned_rounds(run) < 50


@pytest.mark.parametrize("bad", ["bad_prediction", "bad_weight"])
def test_a_run_that_diverged_is_not_advanced_and_predicts_nothing(experiment, bad):
  runs, points = [experiment, experiment], {}
  table = Table(runs, **{bad: (0, 2)})
  assert drive(runs, table, lambda k, point, _: points.update({k: point})) == [DIVERGED, COMPLETED]
  assert table.asked == [[0, 0], [2, 2], [0, 2], [0, 2]]
  assert np.isnan(points[0].probabilities).all()
  assert points[0].rounds == 2
  assert np.isfinite(points[1].probabilities).all()


def test_an_update_that_counts_nothing_is_no_divergence_of_a_run_that_protects_hospitals(
  experiment,
):
  table = Table([experiment], bad_weight=(0, 2))
  table(np.array([0]))
  (reached,) = table(np.array([2]))
  assert has_diverged(experiment, reached)
  (mechanism, *_) = experiment.local.mechanisms
  central = experiment.local._replace(unit="client", mechanisms=(mechanism,))
  protection = experiment.case.protection._replace(central=central)
  guarded = experiment._replace(case=experiment.case._replace(protection=protection))
  assert not has_diverged(guarded, reached)


def test_without_a_log_all_rounds_are_one_advance_and_no_budget_is_asked(experiment):
  run = with_rounds(experiment, 50, target_epsilon=6.0)
  table = Table([run, experiment])
  assert drive([run, experiment], table) == [COMPLETED, COMPLETED]
  assert table.asked == [[50, 6]]
