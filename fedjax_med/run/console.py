"""Terminal output of a run: its plan, live progress, the results of each hospital."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedjax_med.core.text import encodable, visible
from fedjax_med.data.modality import modality_named, worded
from fedjax_med.exchange.ckks import estimate
from fedjax_med.exchange.compression.registry import compression_notes
from fedjax_med.exchange.fixed_point import Grid
from fedjax_med.exchange.masks import fewest_answers
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.folder.secret import is_private
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.prepare.synthetic_images import left_out
from fedjax_med.privacy.guarantees import SEVERAL_IMAGES, UNITS, shared_noise
from fedjax_med.run.drive import BUDGET, Outcome
from fedjax_med.run.measure import Listener, LogPoint
from fedjax_med.run.summaries import FILES, hospital_record
from fedjax_med.simulation.processes import is_first
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Place, Task

MUCH_TRAFFIC, MUCH_TIME = 1e9, 600.0  # bytes and seconds that a dry run warns of
MOST_ROWS = 20  # hospitals in a table on the terminal; files and report hold all of them


class Terminal(Console):
  """A console that spells out letters its encoding lacks before it lays out columns, not after."""

  def render_str(self, text: str, **options: Any) -> Text:
    return super().render_str(encodable(text, self.encoding), **options)


def make_console(quiet: bool = False) -> Console:
  """Colours and a live bar on a terminal, plain lines of fixed width elsewhere.

  Only the first of several processes prints, and none where it is to be ``quiet``. A name with
  colons is no emoji.
  """
  if quiet or not is_first():
    return Console(quiet=True, force_terminal=False)
  console = Terminal(highlight=False, emoji=False)
  return console if console.is_terminal else Terminal(highlight=False, emoji=False, width=110)


def shown_path(path: pathlib.Path) -> str:
  """A path as markup: brackets, ends of line and bytes that are no text are part of it."""
  return escape(visible(str(path)))


def number(value: float | None, digits: int = 3) -> str:
  """A metric for people: a dash where it is undefined."""
  return "–" if value is None else f"{value:.{digits}f}"


def describe(
  console: Console,
  experiment: Experiment,
  rounds: int,
  planned: tuple[float, ...],
  client_epsilon: float | None,
  num_parameters: int,
) -> None:
  """Prints data, hospitals, model and plan of a run, and the ε spent after ``rounds`` rounds."""
  config, hospitals = experiment.config, experiment.hospitals
  dataset, split = hospitals.dataset, hospitals.split
  modality, sides = modality_named(dataset.modality), dataset.inputs.shape[1:3]
  size = "x".join(map(str, sides)) + (" inputs" if dataset.table else "")
  if series := dataset.series:
    size = f"{series.length} samples of {len(series.channels)} channels"
  task = task_named(dataset.task)
  positive = task.positive(dataset.class_names)
  predicted = f"task {dataset.task}"
  if task.has_classes:
    told = f"; positive class: '{positive}'" if positive else ""
    predicted = f"classes {', '.join(dataset.class_names)}{told}"
  console.print(
    f"[bold]{len(hospitals.names)} hospitals[/] share {dataset.num_real} {modality.nouns}"
    f" ({config.data.source}, {size}, {escape(predicted)});"
    f" {len(split.train)} train, {len(split.test)} test, split '{split.scheme}',"
    f" partition '{config.partition.scheme}'"
  )
  if dataset.num_synthetic:
    told = ", ".join(f"{name}: {label}" for name, label in left_out(hospitals))
    console.print(
      f"GANs of the hospitals add {dataset.num_synthetic} synthetic train images"
      f" (client.synthetic_share={config.client.synthetic_share:g})"
      + (f"; too few images to learn from, so that none are made: {escape(told)}" if told else "")
    )
  if split.num_test_with_duplicate_in_train and modality.keeps_copies:
    console.print(
      f"[yellow]{split.num_test_with_duplicate_in_train} of {len(split.test)} test images have a"
      " near-duplicate in train: the score will be optimistic[/]"
    )
  private = is_private(config)
  held = hospital_record(hospitals, names=not private)
  for note in data_notes(held, config.privacy.unit, show_names=not private):
    console.print(f"[yellow]{escape(note.text)}[/]" if note.warning else escape(note.text))
  if private and (dataset.skipped or split.contradictions.pairs):
    console.print(f"  which files: {FILES} in the folder of the run; it is for your eyes alone")
  console.print(
    f"Model {config.model.name} (norm {config.model.norm}, {num_parameters:,} parameters);"
    f" {config.server.num_rounds} rounds of {config.server.algorithm}"
  )
  for note in compression_notes(config.compression):
    console.print(f"[yellow]{escape(note)}[/]")
  if experiment.program.origin:
    console.print(f"  starts from {escape(experiment.program.origin)}")
  grid = experiment.grid
  if grid is not None:
    console.print(f"  {_secure_line(experiment, grid)}")
  for reason in experiment.program.plan.reasons:
    console.print(f"  plan: {escape(reason)}")
  console.print(_hospital_table(experiment, planned))
  total = config.server.num_rounds
  end = "" if rounds == total else f"; the budget stops the run before round {rounds + 1}"
  if experiment.local:
    console.print(
      f"Privacy of {worded(UNITS[experiment.local.unit].protects, modality)}, zero-out adjacency,"
      " DP-SGD:"
      f" {rounds} of {total} rounds would spend ε = {max(planned):.3f} at the worst hospital{end}"
    )
  if experiment.central:
    (mechanism,) = experiment.central.mechanisms
    shared = shared_noise(experiment.central)
    whom = f"against the server and up to {shared.colluders} colluders" if shared else ""
    console.print(
      f"Privacy of {UNITS['client'].protects}, {whom or 'with a trusted server'}, DP-FedAvg:"
      f" q {mechanism.sampling_probability:g}, σ {mechanism.noise_multiplier:.3f}, clip norm"
      f" {mechanism.clip_norm:g}, δ {experiment.central.deltas[0]:.1e}; {rounds} of {total} rounds"
      f" would spend ε = {client_epsilon:.3f}{end}"
    )
  if not experiment.guarantees:
    console.print("Privacy: none (privacy.mechanism=none)")


def _secure_line(experiment: Experiment, grid: Grid) -> str:
  """The grid of whole numbers that updates are sent as, and why no sum of them wraps."""
  config, num_clients = experiment.config, len(experiment.names)
  equal = config.client_privacy.mechanism != "none"
  largest = (num_clients if equal else 1) * grid.range * grid.scale + num_clients
  text = (
    f"updates travel by protocol {config.secure.protocol} as whole numbers of {grid.bits} bits:"
    f" ±{grid.range:g}, 2^{math.log2(grid.scale):g} steps to 1; a sum of {num_clients} is"
  )
  if experiment.central and shared_noise(experiment.central):
    text += f" at most {largest:.10g} and the noise, of which 8 standard deviations have room"
  else:
    text += f" at most {largest:.10g}, under 2^{grid.bits - 1}, so that it cannot wrap"
  if config.secure.protocol == "masking":
    fewest = fewest_answers(config, num_clients)
    text += f"; masks {config.secure.masks}, a round needs {fewest} answers"
  return text


def _hospital_table(experiment: Experiment, planned: tuple[float, ...]) -> Table:
  hospitals = experiment.hospitals
  table = Table(title="Who trains", title_justify="left")
  table.add_column("hospital")
  made = hospitals.train.counts - hospitals.real_counts
  columns = ["train", *(["synthetic"] if made.any() else []), "test", "steps/round"]
  local = experiment.local
  several = local is not None and local.unit in SEVERAL_IMAGES
  if local and several:
    columns.append(f"{local.unit}s")
  columns += ["q", "batch cap", "σ", "δ", "ε planned"] if local else []
  for column in columns:
    table.add_column(column, justify="right")
  for k, name in enumerate(hospitals.names[:MOST_ROWS]):
    row = [escape(name), str(hospitals.real_counts[k]), *([str(made[k])] if made.any() else [])]
    row += [str(hospitals.test.counts[k]), str(experiment.steps[k])]
    if local:
      mechanism = local.mechanisms[k]
      row += [str(mechanism.num_units)] if several else []
      row += [f"{mechanism.sampling_probability:.4f}", str(mechanism.batch_cap)]
      row += [f"{mechanism.noise_multiplier:.3f}", f"{local.deltas[k]:.1e}"]
      row.append(f"{planned[k]:.3f}")
    table.add_row(*row)
  table.caption = _rest(len(hospitals.names))
  return table


def _rest(total: int) -> str | None:
  return (
    f"and {total - MOST_ROWS} more hospitals (all in the report)" if total > MOST_ROWS else None
  )


@contextlib.contextmanager
def progress(console: Console, name: str, num_rounds: int, task: Task) -> Iterator[Listener]:
  """A listener for ``train_rounds``: a live bar on a terminal, a line a log point elsewhere."""
  started: list[tuple[float, int]] = []  # (time, round) of the first log point of this process

  def status(point: LogPoint) -> str:
    shown = task.metrics_in(Place.LINE)
    parts = [f"{metric.label} {number(point.test.get(metric.name))}" for metric in shown]
    if point.epsilons:
      parts.append(f"ε {max(point.epsilons):.3f}")
    if point.client_epsilon is not None:
      parts.append(f"ε of a hospital {point.client_epsilon:.3f}")
    return "  ".join(parts)

  def time_left(done: int) -> str:
    if not started:
      started.append((time.monotonic(), done))
    begin, first = started[0]
    if done <= first:
      return ""
    left = (time.monotonic() - begin) / (done - first) * (num_rounds - done)
    return f"  {left:.0f} s left"

  if not console.is_terminal:

    def line(point: LogPoint) -> None:
      left = time_left(point.rounds)
      console.print(f"{escape(name)}: round {point.rounds}/{num_rounds}  {status(point)}{left}")

    yield line
    return

  columns = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}", markup=False),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as bar:
    row = bar.add_task(name, total=num_rounds, status="compiling")

    def update(point: LogPoint) -> None:
      bar.update(row, completed=point.rounds, status=status(point))

    yield update


def results(console: Console, experiment: Experiment, outcome: Outcome) -> None:
  """Prints the final table: a line a hospital and one for all test images together."""
  point = outcome.last
  table = Table(title=f"Test results after {point.rounds} rounds", title_justify="left")
  table.add_column("hospital")
  dataset = experiment.hospitals.dataset
  task = task_named(dataset.task)
  metrics = task.metrics_in(Place.TERMINAL)
  names = ["n test", *(metric.label for metric in metrics)]
  for column in [*names, *(["ε"] if point.epsilons else [])]:
    table.add_column(column, justify="right")

  def add(name: str, line: dict[str, Any], spent: float | None) -> None:
    values = [line.get(metric.name) for metric in metrics]
    row = [escape(name), str(line["n"]), *map(number, values)]
    table.add_row(*row, *([number(spent)] if point.epsilons else []))

  attacked = any("hostile" in line for line in point.clients)
  for k, line in enumerate(point.clients[:MOST_ROWS]):
    name = f"{line['name']} (hostile)" if "hostile" in line else line["name"]
    add(name, line, point.epsilons[k] if point.epsilons else None)
  table.add_section()
  add(
    "all honest" if attacked else "all",
    point.test,
    float(np.max(point.epsilons)) if point.epsilons else None,
  )
  if point.recordings is not None:
    add("all, as recordings", point.recordings, None)
  about = escape(task.about([task.positive(dataset.class_names)]))
  table.caption = "\n".join(filter(None, [_rest(len(point.clients)), about]))
  console.print(table)
  if outcome.stopped == BUDGET:
    config = experiment.config
    budgets = {
      "privacy.target_epsilon": config.privacy.target_epsilon,
      "client_privacy.target_epsilon": config.client_privacy.target_epsilon,
    }
    told = " or ".join(f"{name}={value:g}" for name, value in budgets.items() if value)
    console.print(
      f"[yellow]Stopped after round {point.rounds}: the next round would cross {told}[/]"
    )


def encryption_estimate(console: Console, experiment: Experiment) -> None:
  """Prints bytes and seconds that CKKS will cost, as a warning where they are many."""
  config = experiment.config
  if config.secure.protocol != "ckks":
    return
  rate = config.server.participation_rate if config.server.participation == "poisson" else 1.0
  cost = estimate(config, experiment.program.parts.message[1], rate * len(experiment.names))
  much = cost.total > MUCH_TRAFFIC or cost.host > MUCH_TIME
  advice = ""
  if much and cost.host:
    advice = "; secure.he=model takes the same sums and counts the same bytes, without encrypting"
  elif cost.host == 0:
    advice = "; secure.he=model encrypts nothing here"
  text = (
    f"CKKS ({config.secure.he_preset}): a hospital sends {_bytes(cost.message)} a round, which"
    f" takes it {cost.hospital:,.1f} s to encrypt; {_bytes(cost.total)} in all, and"
    f" {cost.host:,.0f} s of this simulation on one core{advice}"
  )
  console.print(f"[yellow]{text}[/]" if much else text)


def encryption(console: Console, totals: dict[str, Any]) -> None:
  """Prints what encryption has cost; nothing without it."""
  if totals:
    console.print(
      f"Encryption of {totals['messages']} messages in {totals['rounds']} rounds:"
      f" {_bytes(totals['bytes'])}; encrypt {totals['encrypt']:.1f} s, serialise"
      f" {totals['serialise']:.1f} s, add {totals['add']:.2f} s, decrypt {totals['decrypt']:.1f} s;"
      f" largest error {totals['max_error']:.1g} steps of the grid, which rounding removes"
    )


def _bytes(size: float) -> str:
  return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
