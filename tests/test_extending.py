"""The code of docs/extending.md, run as it is printed: each part is registered in one place.

What it registers is then found in --help, on the terminal, in the files, the report and the privacy
statement, and keeps the promises of the conformance suites.
"""

import html
import inspect
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import fedjax_med
from fedjax_med.core import config as config_lib
from fedjax_med.core import registered, source_facts
from fedjax_med.core.errors import UserError
from fedjax_med.data import sources
from fedjax_med.exchange import registry as exchanges
from fedjax_med.federated import registry as algorithms
from fedjax_med.models import registry as networks
from fedjax_med.privacy.accounting import round_up
from fedjax_med.tasks import registry as tasks
from fedjax_med.tasks.task import Metric
from tests.command import start
from tests.exchange import test_conformance as exchange_promises
from tests.federated import test_conformance as algorithm_promises
from tests.models import test_conformance as network_promises

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
REGISTRIES = (
  (algorithms, "ALGORITHMS"),
  (config_lib, "OPTIONS"),
  (exchanges, "TRANSFORMS"),
  (exchanges, "AGGREGATORS"),
  (networks, "MODELS"),
  (registered, "REGISTERED"),
  (source_facts, "SOURCE_FACTS"),
  (sources, "SOURCES"),
  (tasks, "TASKS"),
)
NETWORK_PROMISES = {
  "test_logits_are_finite_repeatable_and_of_one_example_each": {},
  "test_clipped_sums_of_clients_side_by_side_equal_vmap_of_grad_one_by_one": {
    "method": "book_keeping"
  },
  "test_bfloat16_changes_logits_a_little_and_keeps_them_float32": {},
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
  """A preset with all code of the page, read; what it registers is forgotten afterwards."""
  path = tmp_path_factory.mktemp("extending") / "mine.py"
  path.write_text("\n\n".join(BLOCKS), encoding="utf-8")
  kept = {(module, name): dict(getattr(module, name)) for module, name in REGISTRIES}
  runpy.run_path(str(path), run_name="config")
  yield path
  for (module, name), values in kept.items():  # in place: other modules hold the same dictionary
    getattr(module, name).clear()
    getattr(module, name).update(values)


@pytest.fixture(scope="module")
def ran(preset, tmp_path_factory):
  """(folder, result, what the terminal said) of a private run of the preset."""
  folder = tmp_path_factory.mktemp("ran")
  config = fedjax_med.load_config(preset, {"server.num_rounds": 2})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "stdout", open(folder / "terminal.txt", "w", encoding="utf-8"))  # noqa: SIM115
    result = fedjax_med.simulate(config, folder / "run", verbose=True)
    sys.stdout.close()
  return folder / "run", result, (folder / "terminal.txt").read_text(encoding="utf-8")


def test_each_part_of_the_page_has_at_most_20_lines_besides_imports():
  for block in BLOCKS:
    lines = [line for line in block.splitlines() if line and not re.match(r"import|from", line)]
    assert len(lines) <= 20, block


def test_help_lists_what_a_preset_registers(preset):
  done = subprocess.run(
    [sys.executable, "-m", "fedjax_med.train", f"--config={preset}", "--help"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    encoding="utf-8",
    timeout=120,
    check=True,
  )
  text = " ".join(done.stdout.split())
  assert "--config.options.cautious.caution=0.2 (float) share left out. Read with" in text
  for field, name in (
    ("data.source", "stripes"),
    ("model.name", "net"),
    ("server.algorithm", "cautious"),
    ("server.transforms", "coarse"),
    ("server.aggregator", "bounded"),
  ):
    _, _, after = text.partition(f"--config.{field}=")
    assert f"Registered here: {name}." in after.partition("--config.")[0]


def test_the_terminal_shows_source_network_algorithm_and_metrics(ran):
  text = " ".join(ran[2].split())
  assert "(stripes, 16x16" in text
  assert "Model net " in text
  assert "clipping book_keeping" in text  # covered, so that gradients are clipped fast
  assert "2 rounds of cautious" in text
  assert re.search(r"round 2/2 mean absolute error [\d.]+ share within half a point [\d.]+", text)


def test_files_report_and_statement_are_of_the_parts(ran):
  folder, result, _ = ran
  record = json.loads((folder / "config.json").read_text())
  assert record["task"] == "severity"
  assert record["config"]["options"] == {"cautious": {"caution": 0.2}}
  assert record["notes"][0] == "The stripes are drawn; nobody was examined."
  page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
  for text in (
    "Mean absolute error",
    "Share within half a point",
    "The stripes are drawn; nobody was examined.",
    "cautious for 2 rounds",
    "In points.",
  ):
    assert text in page
  assert "AUROC" not in page
  statement = (folder / "privacy_statement.md").read_text(encoding="utf-8")
  assert "Updates pass through coarse on their way. The server sees each update" in statement
  assert "joins them by bounded" in statement
  assert f"ε ≤ {round_up(result.epsilon_max)} at δ" in statement
  numbers = sum(leaf.size for leaf in jax.tree.leaves(result.weights["params"]))
  visits = 2 * 3  # rounds and hospitals; 4 bytes a number down, 2 up
  megabytes = json.loads((folder / "summary.json").read_text())["megabytes"]
  assert megabytes == pytest.approx(visits * (4 + 2) * numbers / 1e6, abs=1e-6)


def test_the_public_api_gives_the_metrics_of_the_task(ran):
  result = ran[1]
  assert list(result.overall) == ["n", "error", "close"]
  assert 0 < result.overall["error"] < 2
  assert result.weights["params"]["Dense_0"]["kernel"].shape == (16, 1)


def promises():
  """Every promise of the conformance suite of algorithms, with and without DP-SGD."""
  for name, promise in inspect.getmembers(algorithm_promises, inspect.isfunction):
    arguments = set(inspect.signature(promise).parameters)
    if name.startswith("test_") and arguments == {"name", "private"}:
      for private in (False, True):
        quick = name.startswith(("test_five_rounds", "test_learns"))
        marks = () if quick and not private else pytest.mark.slow
        yield pytest.param(promise, private, id=f"{name}-{private}", marks=marks)


@pytest.mark.parametrize(("promise", "private"), list(promises()))
def test_the_algorithm_keeps(preset, promise, private):
  promise("cautious", private)


@pytest.mark.parametrize("promise", NETWORK_PROMISES)
def test_the_network_keeps(preset, promise):
  getattr(network_promises, promise)("net", **NETWORK_PROMISES[promise])


EXCHANGE_PROMISES = {
  "test_a_message_without_weight_counts_exactly_nothing_whatever_it_holds": "bounded",
  "test_the_order_of_clients_does_not_matter_and_equal_updates_are_their_own_aggregate": "bounded",
  "test_parts_of_a_linear_aggregator_add_up": "bounded",
  "test_no_message_is_larger_than_the_update_it_stands_for": "coarse",
}


@pytest.mark.parametrize("promise", EXCHANGE_PROMISES)
def test_transform_and_aggregator_keep(preset, promise):
  getattr(exchange_promises, promise)(EXCHANGE_PROMISES[promise])


def test_rounds_with_transform_and_aggregator_keep_their_promises(preset):
  made = exchanges.Exchange(
    transform=exchanges.chain(exchanges.TRANSFORMS["coarse"]()),
    aggregator=exchanges.AGGREGATORS["bounded"](),
  )
  for promise in (
    exchange_promises.check_resumed_rounds,
    exchange_promises.check_absent_clients,
    exchange_promises.check_learning,
  ):
    promise(made)


def test_a_preset_read_once_more_changes_nothing_and_other_parts_of_a_name_are_refused(preset):
  before = fedjax_med.load_config(preset)
  assert fedjax_med.load_config(preset) == before
  severity, stripes = tasks.task_named("severity"), sources.SOURCES["stripes"]
  assert [metric.name for metric in severity.shown] == ["error", "close"]
  other = Metric(name="close", label="close", value=lambda predictions, scores: 0.0)
  for register, sentence in (
    (lambda: tasks.register(severity._replace(tallied="x")), "a task named 'severity' is reg"),
    (lambda: tasks.add_metric("severity", other), "metric 'close' of task 'severity' is there alr"),
    (lambda: tasks.add_metric("severity", other._replace(value=None)), "has no value; give Metric"),
    (lambda: sources.register("stripes", stripes._replace(seeded=True)), "a source named 'stripes"),
  ):
    with pytest.raises(UserError, match=sentence):
      register()


def test_the_sources_of_what_is_registered_are_part_of_the_run_id(preset):
  assert networks.code_of("net")
  assert algorithms.algorithm_code("cautious")
  assert tasks.task_code("severity")
  assert tasks.task_code("classification") == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(folder, preset) of a run of the page's preset that another process trained."""
  folder = tmp_path_factory.mktemp("elsewhere")
  path = folder / "mine.py"
  path.write_text("\n\n".join(BLOCKS), encoding="utf-8")
  rounds = "--config.server.num_rounds=1"
  done = start("train", f"--config={path}", f"--workdir={folder / 'run'}", rounds)
  assert done.returncode == 0, done.stderr
  return folder / "run", f"--network={path}"


UNKNOWN = "give --network=FILE.py, the file that registers it (usually the --config of the run)"


def refused_without_the_file(network, module, *arguments):
  """An entry point names the flag that it lacks, and works with it; returns what it then says."""
  done = start(module, *arguments)
  assert done.returncode == 2
  assert done.stderr == f"error: the run's task 'severity' is not part of this package; {UNKNOWN}\n"
  done = start(module, *arguments, network)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_the_privacy_of_a_run_of_the_page_is_checked_in_another_process(trained, tmp_path):
  folder, network = shutil.copytree(trained[0], tmp_path / "run"), trained[1]
  done = start("privacy", f"--workdir={folder}")
  assert done.returncode == 0, done.stderr
  assert "report.html was not compared: the run's task 'severity' is not part of" in done.stdout
  assert "ε = " in done.stdout
  done = start("privacy", f"--workdir={folder}", network)
  assert done.returncode == 0, done.stderr
  assert "not compared" not in done.stdout
  page = folder / "report.html"
  page.write_text(page.read_text().replace("ε&nbsp;≤&nbsp;", "ε&nbsp;≤&nbsp;0.", 1))
  done = start("privacy", f"--workdir={folder}", network)
  assert done.returncode == 2
  assert "report.html says" in done.stderr


@pytest.mark.slow
def test_a_run_of_the_page_is_reported_exported_and_predicts_in_another_process(trained, tmp_path):
  folder, network = trained
  page = (folder / "report.html").read_bytes()
  refused_without_the_file(network, "report", f"--workdir={folder}")
  assert (folder / "report.html").read_bytes() == page
  said = refused_without_the_file(network, "export", f"--workdir={folder}", "--format=jax")
  assert "predictions of the task 'severity'" in said
  assert (folder / "export" / "model.jax").exists()
  Image.fromarray(np.full((16, 16), 100, np.uint8)).save(tmp_path / "one.png")
  arguments = (f"--images={tmp_path / 'one.png'}", f"--output={tmp_path / 'table.csv'}")
  refused_without_the_file(network, "predict", f"--workdir={folder}", *arguments)
  title, row = (tmp_path / "table.csv").read_text().splitlines()
  assert title == "file,prediction,error"
  assert re.fullmatch(r"one\.png,-?[\d.e-]+,", row)
  done = start("explain", f"--workdir={folder}", network)
  assert done.returncode == 2
  assert "has the task 'severity', and a map is made for a class" in done.stderr


@pytest.mark.slow
def test_a_sweep_of_the_page_is_merged_in_another_process(trained, tmp_path):
  preset = trained[1].removeprefix("--network=")
  grid = ("--grid=seed=0,1", "--config.server.num_rounds=1")
  done = start("sweep", f"--config={preset}", f"--workdir={tmp_path}", *grid)
  assert done.returncode == 0, done.stderr
  results = (tmp_path / "results.csv").read_bytes()
  done = start("sweep", "merge", f"--workdir={tmp_path}")
  assert done.returncode == 2
  assert done.stderr.startswith("error: the run's task 'severity' is not part of this package; ")
  done = start("sweep", "merge", f"--workdir={tmp_path}", trained[1])
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "results.csv").read_bytes() == results
