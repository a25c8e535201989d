"""Survival: times until an event, of which some are censored; partial likelihood and hazards.

Two tasks share targets, metrics and figures. ``survival_cox`` predicts a log relative risk by the
partial likelihood (Cox 1972) over a hospital's batch: the loss of a record depends on the others,
and each hospital is a stratum with a baseline of its own. ``survival_hazards`` predicts the
probability of the event in each of some intervals, given that there was none before: its loss is
a sum over records, so that DP-SGD can clip it (Andreux et al. 2020, arXiv 2006.08997). jax is
imported inside of functions: reports and tables do without it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.tasks.classification import labels_of
from fedjax_med.tasks.concordance import THIRDS, concordance, kaplan_meier, thirds
from fedjax_med.tasks.task import (
  Figure,
  Labelled,
  Loss,
  Metric,
  Place,
  PredictionTable,
  Targets,
  Task,
  require_no_smoothing,
  required_targets,
)

if TYPE_CHECKING:
  import jax

COX, HAZARDS = "survival_cox", "survival_hazards"
STATES = ("censored", "event")  # names of the groups that splits and partitions keep
TIME, EVENT, FIXED = 0, 1, 2  # columns of the targets, and their number
GRID = 101  # times of a Kaplan-Meier curve: exact ones would be those of single people
SMALLEST = 1e-7  # hazards nearer to 0 or 1 count as this far off, in the reported loss
NEIGHBOURS = 8
COLOURS = ("#0072B2", "#E69F00", "#D55E00")

SHOWN = (
  Metric(name="c_index", label="C-index", bounds=(0.0, 1.0)),
  Metric(
    name="c_within",
    label="C within hospitals",
    bounds=(0.0, 1.0),
    places=frozenset({Place.TERMINAL, Place.SWEEP, Place.PAPER}),
  ),
  Metric(name="loss", label="loss", better="lower", unit="nats", places=frozenset({Place.CURVES})),
)
NAMES = tuple(metric.name for metric in SHOWN)


def cut_points(horizon: float, intervals: int) -> np.ndarray:
  """[intervals] float64 ends of intervals of equal width from 0 to ``horizon``."""
  return horizon * np.arange(1, intervals + 1) / intervals


def fitted_cut_points(time: np.ndarray, event: np.ndarray, intervals: int) -> np.ndarray:
  """[intervals] float64 ends of intervals with as many events each: quantiles of event times.

  Raises:
    UserError: there is no event, or two ends are equal.
  """
  times = time[event].astype(np.float64)
  require(
    len(times) > 0,
    "data.interval_bounds='quantiles' finds no event in the training records",
    "use data.interval_bounds=equal",
  )
  require(
    len(times) >= intervals,
    f"data.intervals={intervals} with data.interval_bounds='quantiles' and {len(times)} events in"
    " the training records, whose very times the ends would be",
    "use fewer intervals, or data.interval_bounds=equal",
  )
  ends = np.quantile(times, np.arange(1, intervals + 1) / intervals)
  require(
    bool((np.diff(ends, prepend=0.0) > 0).all()),
    f"data.intervals={intervals}: the {len(times)} events of the training records have too few"
    " different times",
    "use fewer intervals, or data.interval_bounds=equal",
  )
  return ends


def interval_targets(time: np.ndarray, event: np.ndarray, ends: np.ndarray) -> np.ndarray:
  """[n, 2 J] float32: intervals that a record survived, and that in which its event was, 0 or 1.

  Interval k reaches from the end before it, without it, to ``ends[k]``. A censored record counts
  in its last interval if it was observed for half of it or more (Gensheimer and Narasimhan 2019,
  arXiv 1805.00917). Whatever comes after the last end is not counted.
  """
  place = np.searchsorted(ends, time, side="left")[:, None]
  number = np.arange(len(ends))
  middle = (np.concatenate([[0.0], ends[:-1]]) + ends) / 2
  here = place == number
  survived = (number < place) | (here & ~event[:, None] & (time[:, None] >= middle))
  return np.concatenate([survived, here & event[:, None]], axis=1).astype(np.float32)


def times_and_events(dataset: Labelled) -> np.ndarray:
  """Returns [N, 2] float32: time, and event, 0 or 1."""
  return required_targets(dataset).values


def with_intervals(dataset: Labelled) -> np.ndarray:
  """Returns [N, 2 + 2 J] float32: time, event, and the columns of ``interval_targets``."""
  targets = required_targets(dataset)
  values, ends = targets.values, targets.fitted["ends"]
  return np.concatenate(
    [values, interval_targets(values[:, TIME], values[:, EVENT] > 0.5, ends)], axis=1
  )


def one_risk(dataset: Labelled) -> int:
  """Returns 1: the network has one output, the log relative risk."""
  return 1


def num_intervals(dataset: Labelled) -> int:
  """Returns the number of intervals: each has an output, the logit of its hazard."""
  return len(required_targets(dataset).fitted["ends"])


def fit_ends(targets: Targets, rows: Sequence[np.ndarray]) -> Targets:
  """The targets with ends of intervals: quantiles of the training events, where none are given.

  Args:
    targets: ``fitted`` holds ``ends``, or the number of ``intervals``.
    rows: training rows of each hospital.
  """
  if "ends" in targets.fitted:
    return targets
  held = targets.values[np.concatenate(rows)]
  number = int(targets.fitted["intervals"][0])
  ends = fitted_cut_points(held[:, TIME], held[:, EVENT] > 0.5, number)
  return targets._replace(fitted={"ends": ends.astype(np.float32)})


def partial_likelihood(label_smoothing: float) -> Loss:
  """Returns the loss of a batch: minus the log partial likelihood, Breslow's for equal times.

  (outputs [B, 1], targets [B, 2]) -> [B]. The loss of an event is the log-sum-exp of the outputs of
  all that were at risk at its time, minus its own; that of other records is 0, and places whose
  targets are nan are not there. A batch without an event has loss and gradient 0.
  """
  import jax
  import jax.numpy as jnp

  require_no_smoothing(label_smoothing, "survival")

  def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    risk, mask = outputs[:, 0].astype(jnp.float32), ~jnp.isnan(targets[:, TIME])
    time = jnp.where(mask, targets[:, TIME], -jnp.inf)
    order = jnp.argsort(-time)  # longest first, masked last
    sums = jax.lax.cumlogsumexp(jnp.where(mask, risk, -1e30)[order])
    last = jnp.searchsorted(-time[order], -time, side="right") - 1  # of equal times all count
    return jnp.where(mask & (targets[:, EVENT] > 0.5), sums[last] - risk, 0)

  return loss


def interval_likelihood(label_smoothing: float) -> Loss:
  """Returns the loss of each record: minus the log likelihood of its intervals.

  (outputs [B, J], targets [B, 2 + 2 J]) -> [B]. An output is the logit of the probability of the
  event in an interval, given that there was none before.
  """
  import jax
  import jax.numpy as jnp

  require_no_smoothing(label_smoothing, "survival")

  def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    survived, ended = jnp.split(targets[:, FIXED:], 2, axis=1)
    logits = outputs.astype(jnp.float32)
    return (survived * jax.nn.softplus(logits) + ended * jax.nn.softplus(-logits)).sum(axis=1)

  return loss


def log_risk(outputs: "jax.Array") -> "jax.Array":
  """Returns float32 log relative risks [B, 1]."""
  import jax.numpy as jnp

  return outputs.astype(jnp.float32)


def hazards_of(outputs: "jax.Array") -> "jax.Array":
  """Returns float32 hazards [B, J], the probabilities of the event in each interval."""
  import jax
  import jax.numpy as jnp

  return jax.nn.sigmoid(outputs.astype(jnp.float32))


def neighbours_in_order(outputs: "jax.Array", targets: "jax.Array") -> "jax.Array":
  """Returns [B] share of a record's comparable pairs whose risks are in the right order.

  Each record is compared with the next eight of its shuffled batch: all pairs would be B² numbers.
  Ties count half; a record without a comparable pair has 0.5.
  """
  import jax
  import jax.numpy as jnp

  # Of hazards: minus the log probability of no event, summed over the ends of the intervals.
  left = jnp.arange(outputs.shape[1], 0, -1).astype(jnp.float32)
  logits = outputs.astype(jnp.float32)
  hazards = (jax.nn.softplus(logits) * left[None]).sum(axis=1)
  risk = logits[:, 0] if outputs.shape[1] == 1 else hazards
  time, event = targets[:, TIME], targets[:, EVENT] > 0.5
  right = total = jnp.zeros_like(risk)
  for step in range(1, NEIGHBOURS + 1):
    other, later, died = (jnp.roll(values, -step) for values in (risk, time, event))
    first = event & ((time < later) | ((time == later) & ~died))
    second = died & ((later < time) | ((time == later) & ~event))
    ahead = jnp.where(first, risk - other, other - risk)
    score = jnp.where(ahead > 0, 1.0, jnp.where(ahead == 0, 0.5, 0.0))
    known = first | second
    right, total = right + jnp.where(known, score, 0), total + known.astype(jnp.float32)
  return jnp.where(total > 0, right / jnp.maximum(total, 1), 0.5)


def survival_curves(hazards: np.ndarray) -> np.ndarray:
  """[n, J] float64 probabilities of no event up to the end of each interval."""
  return np.cumprod(1 - hazards.astype(np.float64), axis=1)


def risks(predictions: np.ndarray) -> np.ndarray:
  """[n] float64 by which records are ranked, the higher the sooner the event.

  Args:
    predictions: [n, 1] log relative risks, which are it, or [n, J] hazards: then it is the
      cumulative hazard, summed over the ends of the intervals (as of a survival forest).
  """
  if predictions.shape[1] == 1:
    return predictions[:, 0].astype(np.float64)
  survived = np.maximum(survival_curves(predictions), np.finfo(np.float64).tiny)
  return -np.log(survived).sum(axis=1)


def cox_loss(predictions: np.ndarray, targets: np.ndarray) -> float:
  """Mean over records of the partial likelihood's loss, all of them one stratum."""
  risk = predictions[:, 0].astype(np.float64)
  order = np.argsort(-targets[:, TIME], kind="stable")
  sums, times = np.logaddexp.accumulate(risk[order]), -targets[order, TIME]
  at_risk = sums[np.searchsorted(times, times, side="right") - 1]
  return float(((at_risk - risk[order]) * targets[order, EVENT]).mean())


def hazard_loss(predictions: np.ndarray, targets: np.ndarray) -> float:
  """Mean over records of minus the log likelihood of their intervals."""
  survived, ended = np.split(targets[:, FIXED:].astype(np.float64), 2, axis=1)
  hazards = np.clip(predictions.astype(np.float64), SMALLEST, 1 - SMALLEST)
  losses = -(survived * np.log1p(-hazards) + ended * np.log(hazards))
  return float(losses.sum(axis=1).mean())


def _metrics(
  loss: Callable[[np.ndarray, np.ndarray], float], predictions: np.ndarray, targets: np.ndarray
) -> dict[str, Any]:
  n = len(predictions)
  if n == 0 or not np.isfinite(predictions).all():
    return {**dict.fromkeys(NAMES), "pairs": 0, "n": n}
  pairs = concordance(targets[:, TIME], targets[:, EVENT] > 0.5, risks(predictions))
  return {
    "c_index": pairs.c_index,
    "c_within": pairs.c_index,
    "loss": loss(predictions, targets),
    "pairs": pairs.comparable,
    "n": n,
  }


def cox_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
  """Returns c_index, c_within and loss, None where undefined, the number of pairs, and n.

  Args:
    predictions: [n, 1] log relative risks.
    targets: [n, 2] times and events.
  """
  return _metrics(cox_loss, predictions, targets)


def hazard_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
  """Returns the same of [n, J] hazards and [n, 2 + 2 J] targets."""
  return _metrics(hazard_loss, predictions, targets)


def within_hospitals(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns c_within of all hospitals by their metrics: over pairs of one hospital only."""
  known = [line for line in lines if line["c_index"] is not None]
  pairs = sum(line["pairs"] for line in known)
  concordant = sum(line["c_index"] * line["pairs"] for line in known)
  return {"c_within": concordant / pairs if pairs else None}


def stratified(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns c_within, and the loss of a Cox model in which each hospital is a stratum."""
  known = [line for line in lines if line["n"]]
  sound = bool(known) and all(line["loss"] is not None for line in known)
  total = sum(line["loss"] * line["n"] for line in known) if sound else None
  loss = None if total is None else total / sum(line["n"] for line in known)
  return {**within_hospitals(lines), "loss": loss}


def cox_table(predictions: np.ndarray, targets: Targets) -> PredictionTable:
  """Returns the log relative risk of each record."""
  del targets
  rows = [[[f"{row[0]:.7g}"]] for row in predictions]
  return PredictionTable(heading=("log relative risk",), rows=rows)


def hazard_table(predictions: np.ndarray, targets: Targets) -> PredictionTable:
  """Returns the risk of each record, and its survival curve at the ends of the intervals."""
  ends, curves = targets.fitted["ends"], survival_curves(predictions)
  rows = zip(risks(predictions), curves, strict=True)
  return PredictionTable(
    heading=("risk", *(f"no event to {end:.7g}" for end in ends)),
    rows=[[[f"{value:.7g}" for value in (risk, *curve)]] for risk, curve in rows],
  )


def details(predictions: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
  """Returns Kaplan-Meier curves of the thirds by predicted risk, for summary.json."""
  if len(predictions) == 0 or not np.isfinite(predictions).all():
    return {"kaplan_meier": {"time": [], "thirds": []}}
  time, event = targets[:, TIME].astype(np.float64), targets[:, EVENT] > 0.5
  at, third = np.linspace(0, time.max(), GRID), thirds(risks(predictions))
  groups = []
  for number in range(len(THIRDS)):
    rows = third == number
    curve = kaplan_meier(time[rows], event[rows], at)
    groups.append(
      {"n": int(rows.sum()), "events": int(event[rows].sum()), "survival": curve.round(6).tolist()}
    )
  return {"kaplan_meier": {"time": at.round(6).tolist(), "thirds": groups}}


def problem(summary: dict[str, Any], class_names: Sequence[str]) -> str:
  """Returns the fault of the curves of summary.json; empty if there is none."""
  held = summary.get("kaplan_meier", {"time": [], "thirds": []})
  try:
    count = len(held["time"])
    sound = all(
      len(third["survival"]) == count and {type(third["n"]), type(third["events"])} <= {int}
      for third in held["thirds"]
    )
  except (KeyError, TypeError):
    sound = False
  return "" if sound else "kaplan_meier holds no curves of one length"


def pool(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Averages the curves of runs, weighted by their records, up to the shortest of their times."""
  held = [run["kaplan_meier"] for run in runs if run["kaplan_meier"]["thirds"]]
  if not held:
    return {"kaplan_meier": {"time": [], "thirds": []}}
  at = np.linspace(0, min(one["time"][-1] for one in held), GRID)
  groups = []
  for number in range(len(THIRDS)):
    parts = [one["thirds"][number] for one in held]
    curves = [np.interp(at, one["time"], one["thirds"][number]["survival"]) for one in held]
    weights = np.array([part["n"] for part in parts], np.float64)
    curve = np.average(curves, axis=0, weights=weights if weights.any() else None)
    counts = {name: sum(part[name] for part in parts) for name in ("n", "events")}
    groups.append({**counts, "survival": curve.tolist()})
  return {"kaplan_meier": {"time": at.tolist(), "thirds": groups}}


def draw_curves(axis: Any, details: dict[str, Any], names: Sequence[str], crowded: bool) -> None:
  """Draws the curves of the thirds."""
  held = details["kaplan_meier"]
  for word, third, colour in zip(THIRDS, held["thirds"], COLOURS, strict=False):
    label = word if crowded else f"{word} risk: {third['n']}, {third['events']} with the event"
    axis.step(held["time"], third["survival"], where="post", color=colour, label=label)
  axis.set_ylim(0, 1.02)
  if held["thirds"]:
    axis.legend(fontsize=7 if crowded else 9, frameon=False, loc="upper right")
  if not crowded:
    axis.set(xlabel="time", ylabel="probability of no event")


def about(positives: Sequence[str]) -> str:
  """Returns the sentence below a table that says what C is."""
  return "C is the share of comparable pairs in which the higher risk had the event first."


def explained(class_names: Sequence[str]) -> str:
  """Returns sentences that explain the metrics of a report."""
  return (
    "The C-index (Harrell) is the share of pairs, of all of whom it is known who had the event"
    " first, in which that one has the higher predicted risk; ties count half, 0.5 is chance. C"
    " within hospitals compares records of the same hospital only. Under a Cox model each hospital"
    " has a baseline of its own, so that risks of two hospitals are compared with care. A dash"
    " stands for a value that is not defined, such as C of a hospital without a comparable pair."
  )


CURVES = Figure(
  name="kaplan_meier",
  title="test records without the event, by predicted risk",
  caption=lambda class_names: (
    "Kaplan-Meier estimates of all test records in three groups of about equal size, by the risk"
    " that the model predicts."
  ),
  pooled_title="Test records without the event, by predicted risk",
  pooled_caption="Kaplan-Meier estimates of three groups by predicted risk, averaged over the"
  " points of a setting.",
  size=lambda names, widest: (6.4, 4.4),
  pool=pool,
  draw=draw_curves,
  of_classes=False,
)
SURVIVAL_COX = Task(
  name=COX,
  targets=times_and_events,
  columns=one_risk,
  loss=partial_likelihood,
  predict=log_risk,
  tally=neighbours_in_order,
  tallied="pairs in order",
  metrics=cox_metrics,
  details=details,
  problem=problem,
  shown=SHOWN,
  strata=labels_of,
  figures=(CURVES,),
  about=about,
  explained=explained,
  has_classes=False,
  table=cox_table,
  zero_head=True,
  joint="the partial likelihood of a record is made of the risks of the others (data.survival=cox)",
  across=stratified,
)
SURVIVAL_HAZARDS = SURVIVAL_COX._replace(
  name=HAZARDS,
  targets=with_intervals,
  columns=num_intervals,
  loss=interval_likelihood,
  predict=hazards_of,
  metrics=hazard_metrics,
  fit=fit_ends,
  releases="quantiles of the times of events (data.interval_bounds=quantiles)",
  table=hazard_table,
  joint="",
  across=within_hospitals,
)
