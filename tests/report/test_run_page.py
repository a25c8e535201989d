"""The report of a made-up run: complete, self-contained, equal to its files, deterministic."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from fedjax_med.core import config as config_lib
from fedjax_med.core.errors import UserError
from fedjax_med.prepare.deployment import deployment_record
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.statement import ASSUMPTIONS
from fedjax_med.report import figures
from fedjax_med.report.run_page import write_report
from fedjax_med.tasks.classification import (
  CLASSIFICATION,
  NAMES,
  classification_metrics,
  confusion_matrix,
)

VOID = {"meta", "img", "br", "link"}
FIGURES = ("partition", "rounds", "hospitals", "confusion")


def made_up_claims(path, guarantee, rounds, epsilons):
  """A ledger in which these ε stand, uncomputed; returns privacy.json of it."""
  book = ledger.start(path, "3f9c01ab77de", [guarantee])
  ran = ledger.Ran(fedjax_med="0.3.0", dp_accounting="0.6", clipping="two_pass", baselines=False)
  counted = {"rounds": rounds, "counts": [[80] * len(epsilons)], "epsilons": [epsilons]}
  lines = [{"ran": ran._asdict()}, counted]
  return claims.record_of(ledger._continued(path / ledger.FILE, book, lines), path)


def fake_workdir(
  path, num_hospitals=5, private=True, baselines=True, class_names=("no tumour", "tumour"),
  split="grouped", num_log_points=10,
):  # fmt: skip
  """Writes the files of a plausible run; returns {file stem: contents}."""
  rng = np.random.default_rng(7)
  num_classes = len(class_names)
  names = [f"Hospital {chr(65 + k)}" if num_hospitals < 27 else f"H{k:03d}"
           for k in range(num_hospitals)]  # fmt: skip
  shares = rng.dirichlet([0.8] * num_classes, num_hospitals)
  sizes = rng.lognormal(5.2, 0.7, num_hospitals).astype(int) + 12
  train = [
    np.round(size * share).astype(int).tolist() for size, share in zip(sizes, shares, strict=True)
  ]
  test = [np.ceil(np.array(counts) / 4).astype(int).tolist() for counts in train]

  def measure(skill):
    """Per-hospital metrics, and all of it together, of a model with this skill."""
    pairs = []
    for counts in test:
      labels = np.repeat(np.arange(num_classes), counts)
      logits = rng.normal(size=(len(labels), num_classes)) + skill * np.eye(num_classes)[labels]
      pairs.append((np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels))
    together = [np.concatenate(part) for part in zip(*pairs, strict=True)]
    return [classification_metrics(*pair) for pair in pairs], together

  epsilons = rng.uniform(5, 7.981, num_hospitals)
  log, alone, pooled = [], [{"name": name, "curve": []} for name in names], []
  number, overall, clients, together = 0, {}, [], []
  for point in range(1, num_log_points + 1):
    done, number = point / num_log_points, 2 * point
    own, together = measure(3.2 * np.sqrt(done))
    overall = classification_metrics(*together)
    spent = epsilons * np.sqrt(done) if private else [None] * num_hospitals
    clients = [{"name": name, **values, "epsilon": epsilon}
               for name, values, epsilon in zip(names, own, spent, strict=True)]  # fmt: skip
    log.append({"round": number, "split": "train", **dict.fromkeys(NAMES),
                "loss": overall["loss"] + 0.1, "accuracy": overall["accuracy"] - 0.05})  # fmt: skip
    log.append({"round": number, "split": "test", **overall, "clients": clients, "seconds": 3.1,
                "epsilon_max": max(epsilons) * np.sqrt(done) if private else None})  # fmt: skip
    local, _ = measure(1.6 * np.sqrt(done))
    for k in range(num_hospitals):
      everywhere = classification_metrics(*measure(1.1 * np.sqrt(done))[1]) if k < 5 else local[0]
      alone[k]["curve"].append({"round": number, "own": local[k], "all": everywhere})
    own_pooled, together_pooled = measure(3.6 * np.sqrt(done))
    pooled.append({"round": number, "all": classification_metrics(*together_pooled),
                   "clients": own_pooled})  # fmt: skip

  config = config_lib.to_dict(config_lib.Config())
  num_test = sum(map(sum, test))
  leaked = 0 if split == "grouped" else int(0.84 * num_test)
  holdings = [{"name": name, "train": train[k], "test": test[k]} for k, name in enumerate(names)]
  files = {
    "config": {
      "run_id": "3f9c01ab77de",
      "command": "python -m fedjax_med.train --config=configs/quickstart.py --workdir=runs/<demo>",
      "versions": {"fedjax_med": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
      "config": config,
      "notes": [
        "Phantoms are drawings, not patients: these numbers say nothing about a clinic.",
        "SARS-CoV-2-CT has no patient numbers: adjacent slices of one patient may be on two sides.",
      ],
    },
    "hospitals": {
      "class_names": list(class_names),
      "split": {
        "scheme": split, "num_train": sum(map(sum, train)), "num_test": num_test,
        "num_duplicate_groups": 412, "num_in_duplicate_groups": 1077,
        "num_test_with_duplicate_in_train": leaked,
      },
      "num_moved": 9,
      "skipped": [["yes/y17.jpg", "not an image"], ["no/<n3>.png", "20 × 18 pixels"]],
      "hospitals": holdings,
    },
    "privacy": {"mechanism": "none", "epsilon_max": None},
    "summary": {
      "run_id": "3f9c01ab77de", "config_name": "quickstart", "rounds": number,
      "stopped": "completed",
      "predicts": "global model", "test": overall, "clients": clients,
      "epsilon_max": max(epsilons) if private else None,
      "confusion": confusion_matrix(*together).tolist(),
      "num_parameters": 25_512_354,
      "plan": {"layout": "scan", "clipping": "two_pass", "lowering": "matmul",
               "reasons": ["One hospital at a time fits in memory and was fastest in the probe."]},
    },
    "timing": {"compile": 21.4, "train": 184.2, "total": 223.9},
  }  # fmt: skip
  path.mkdir(parents=True, exist_ok=True)
  if private:
    sizes = list(map(sum, train))
    mechanisms = [PoissonGaussian(n, min(1.0, 32 / n), min(n, 70), 0.9137, 1.0) for n in sizes]
    deltas = tuple(0.1 / n for n in sizes)
    local = Guarantee("record", tuple(names), tuple(mechanisms), deltas)
    files["privacy"] = made_up_claims(path, local, number, [float(each) for each in epsilons])
  if baselines:
    files["baselines"] = {"alone": alone, "pooled": {"curve": pooled}}
  for name, contents in files.items():
    (path / f"{name}.json").write_text(json.dumps(contents))
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
  return {**files, "log": log}


class Outline(html.parser.HTMLParser):
  """Checks that tags balance; collects table rows by table id and the targets of src and href."""

  def __init__(self):
    super().__init__()
    self.open, self.targets, self.rows, self.text = [], [], {}, []
    self.table, self.row = "", []

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.targets += [values[name] for name in ("src", "href") if name in values]
    if tag in VOID:
      return
    self.open.append(tag)
    if tag == "table":
      self.table = values.get("id", "")
    if tag == "tr":
      self.row = []
    if tag in ("th", "td"):
      self.row.append("")
    if tag == "data":
      self.row[-1:] = [float(values["value"] or "nan")] if self.row else []

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
    if tag == "tr":
      cells = [cell.strip() if isinstance(cell, str) else cell for cell in self.row]
      self.rows.setdefault(self.table, []).append(cells)
      self.row = []

  def handle_data(self, data):
    self.text.append(data)
    if self.row and isinstance(self.row[-1], str):
      self.row[-1] += data


def outline(page):
  parser = Outline()
  parser.feed(page)
  parser.close()
  assert parser.open == []
  return parser


CASES = {
  "private_with_baselines": {},
  "plain_paper_split": {
    "private": False, "baselines": False, "split": "paper", "num_log_points": 1,
  },
  "many_hospitals": {"num_hospitals": 60, "num_log_points": 2},
  "many_hospitals_four_classes": {
    "num_hospitals": 40, "private": False, "baselines": False, "num_log_points": 2,
    "class_names": ("normal", "glioma", "meningioma", "pituitary"),
  },
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def run(request, tmp_path_factory):
  """(workdir, its contents, the page) of each case."""
  workdir = tmp_path_factory.mktemp("run")
  files = fake_workdir(workdir, **request.param)
  path = write_report(workdir)
  assert path == workdir / "report.html"
  return workdir, files, path.read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(run):
  workdir, _, page = run
  parsed = outline(page)
  assert len(parsed.targets) == len(FIGURES)
  assert all(target.startswith("data:image/png;base64,") for target in parsed.targets)
  assert not re.search(r"https?:|url\(|@import|<script|<link", page)
  for name in FIGURES:
    assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_hospital_is_there_with_the_numbers_of_the_files(run):
  _, files, page = run
  rows = outline(page).rows["results"]
  keys = [metric.name for metric in CLASSIFICATION.shown]
  by_name = {row[0]: row for row in rows}
  for holds, client in zip(
    files["hospitals"]["hospitals"], files["summary"]["clients"], strict=True
  ):
    row = by_name[holds["name"]]
    assert row[1:3] == [sum(holds["train"]), sum(holds["test"])]
    assert row[3 : 3 + len(keys)] == ["–" if client[key] is None else client[key] for key in keys]
  test = files["summary"]["test"]
  assert by_name["All hospitals"][3 : 3 + len(keys)] == [test[key] for key in keys]
  accuracies = [client["accuracy"] for client in files["summary"]["clients"]]
  losses = [client["loss"] for client in files["summary"]["clients"]]
  assert by_name["Mean of the hospitals"][4] == pytest.approx(np.mean(accuracies))
  assert by_name["Worst hospital"][4] == min(accuracies)
  assert by_name["Worst hospital"][9] == max(losses)


def test_every_note_stands_on_the_page(run):
  _, files, page = run
  text = "".join(outline(page).text)
  for note in files["config"]["notes"]:
    assert note in text
  for name, reason in files["hospitals"]["skipped"]:
    # A file may be named after a patient.
    assert (name in text) == (files["privacy"]["mechanism"] == "none")
    assert reason in text
  assert files["config"]["command"] in text
  for name, version in files["config"]["versions"].items():
    assert f"{name} {version}" in text


def test_privacy_section_says_what_is_and_what_is_not_guaranteed(run):
  _, files, page = run
  parsed = outline(page)
  text = " ".join("".join(parsed.text).split())
  if files["privacy"]["mechanism"] == "none":
    assert not any(name.startswith("privacy") for name in parsed.rows)
    assert "this run gives no formal privacy guarantee" in text
    assert "ε ≤" not in text
    return
  rows = parsed.rows["privacy-record"][1:]
  (guarantee,) = files["privacy"]["guarantees"]
  assert [row[0] for row in rows] == [row["name"] for row in guarantee["parties"]]
  for row, hospital in zip(rows, guarantee["parties"], strict=True):
    assert row[1:5] == [
      hospital[key] for key in ("n", "sampling_probability", "batch_cap", "noise_multiplier")
    ]
    assert hospital["epsilon"] <= float(row[8]) < hospital["epsilon"] + 0.01
  for phrase in (guarantee["protects"], guarantee["adjacency"], *guarantee["holds_against"],
                 *files["privacy"]["not_covered"], *ASSUMPTIONS, "No audit was made"):  # fmt: skip
    assert phrase in text


def test_leakage_sentence_gives_the_share_of_leaked_test_images(run):
  _, files, page = run
  text = " ".join("".join(outline(page).text).split())
  split = files["hospitals"]["split"]
  leaked, total = split["num_test_with_duplicate_in_train"], split["num_test"]
  if split["scheme"] == "grouped":
    assert f"0 of {total:,} test images have a near-duplicate in train" in text
    assert "optimistic" not in text
  else:
    sentence = f"{leaked:,} of {total:,} ({100 * leaked / total:.1f}%) test images"
    assert text.count(sentence) == 2  # once beside the headline
    assert "the score is optimistic" in text


def test_baselines_stand_beside_the_global_model(run):
  _, files, page = run
  rows = outline(page).rows
  if "baselines" not in files:
    assert "comparison" not in rows
    assert "trained alone" not in page
    return
  pooled = files["baselines"]["pooled"]["curve"][-1]
  assert rows["comparison"][2][2] == pooled["all"]["accuracy"]
  for row, alone in zip(rows["alone"][1:], files["baselines"]["alone"], strict=True):
    last = alone["curve"][-1]
    assert row[0] == alone["name"]
    assert row[4] == last["own"]["accuracy"]
    assert row[6] == last["all"]["accuracy"]


def test_report_again_gives_the_same_bytes_and_keeps_the_examples_of_the_run(tmp_path):
  fake_workdir(tmp_path, num_log_points=1)
  image = np.arange(64, dtype=np.uint8).reshape(8, 8)
  figures.draw_examples(
    tmp_path / "figures" / "examples.png", [[image, None], [image, image]], ["A", "B"],
    ["no tumour", "tumour"],
  )  # fmt: skip
  first = write_report(tmp_path).read_bytes()
  assert write_report(tmp_path).read_bytes() == first
  assert len(outline(first.decode()).targets) == len(FIGURES) + 1


@pytest.mark.parametrize(
  ("name", "text", "problem"),
  [
    ("summary.json", None, "summary.json cannot be read"),
    ("summary.json", "{", "summary.json is not JSON"),
    ("summary.json", "[]", "must be dict"),
    ("privacy.json", '{"mechanism": "dp_sgd", "epsilon_max": 3}', "lacks 'guarantees'"),
    ("privacy.json", '{"mechanism": "none", "epsilon_max": "3"}', "must be int | float or null"),
    ("metrics.jsonl", '{"round": 1, "split": "te', "metrics.jsonl, line 1 is not JSON"),
    ("metrics.jsonl", "", "no line with split=test"),
    ("baselines.json", '{"alone": [], "pooled": {"curve": []}}', "names 0 hospitals, not the 5"),
    ("summary.json", "[[1]]", "summary.json is [[1]], which must be dict"),
    ("hospitals.json", '{"class_names": [1]}', "class_names[0] is 1, which must be str"),
  ],
)
def test_a_bad_workdir_is_one_sentence_with_the_file_and_a_remedy(tmp_path, name, text, problem):
  fake_workdir(tmp_path, num_log_points=1)
  (tmp_path / name).unlink()
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError) as caught:
    write_report(tmp_path)
  assert problem in str(caught.value)
  assert name in str(caught.value)
  assert "; " in str(caught.value)
  assert not (tmp_path / "report.html").exists()


def with_deployment(path):
  """A plausible run with links: hospital B is late in each of its rounds."""
  made = fake_workdir(path, num_log_points=2, private=False, baselines=False)
  more = {"bytes_up": 306_000, "bytes_down": 1_200_000, "megabytes": 28.9}
  facts = {"saturated": 0.25, "lost": {"Hospital B": 4}, "left_out": {}}
  (path / "summary.json").write_text(json.dumps({**made["summary"], **more, "exchange": facts}))
  names, config = [row["name"] for row in made["hospitals"]["hospitals"]], config_lib.Config()
  cost = config.cost
  cost.uplink_mbps, cost.deadline_s, cost.step_seconds = "20", 60.0, 1.0
  cost.client_speed, cost.price_gb = "1,0.1,1,1,1", 2.0
  found = deployment_record(config, names, (1_200_000, 306_000), np.full(5, 20), 4, 0.0, 28.9e6)
  assert found is not None
  (path / "deployment.json").write_text(json.dumps(found))
  return found


def test_the_page_says_what_travels_and_what_a_deployment_would_cost(tmp_path):
  found = with_deployment(tmp_path)
  page = write_report(tmp_path).read_text()
  text = " ".join(" ".join(outline(page).text).split())
  for said in ("gets 1.200 MB", "sends 0.306 MB", "moved 28.9 MB", "saturated 0.25"):
    assert said in text
  assert "Hospital B: 4" in text
  assert found["round_seconds"] == 60  # 4 rounds of 60 s
  assert "4 rounds would take 4 min 0 s and move" in text
  assert "at a price of 0.06" in text  # 2 for each GB, of 28.9 MB
  assert "are left out: Hospital B." in text
  assert (tmp_path / "figures" / "deployment.png").exists()


def test_a_deployment_that_lacks_a_number_is_refused(tmp_path):
  found = with_deployment(tmp_path)
  del found["hours"]
  (tmp_path / "deployment.json").write_text(json.dumps(found))
  with pytest.raises(UserError, match=r"deployment.json lacks 'hours'; "):
    write_report(tmp_path)


@pytest.mark.parametrize(
  ("key", "value"),
  [("class_names", ["one"]), ("skipped", [["name without a reason"]])],
)
def test_hospitals_that_contradict_themselves_are_refused(tmp_path, key, value):
  hospitals = fake_workdir(tmp_path, num_log_points=1)["hospitals"]
  (tmp_path / "hospitals.json").write_text(json.dumps({**hospitals, key: value}))
  with pytest.raises(UserError, match=r"hospitals\.json"):
    write_report(tmp_path)


def test_entry_point_writes_the_report_or_one_sentence_and_exit_code_2(tmp_path):
  fake_workdir(tmp_path / "run", num_log_points=1)
  command = [sys.executable, "-m", "fedjax_med.report"]
  done = subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
  failed = subprocess.run(
    [*command, f"--workdir={tmp_path / 'no'}"], capture_output=True, text=True
  )
  assert failed.returncode == 2
  assert failed.stderr.strip().splitlines() == [
    f"error: workdir={tmp_path / 'no'} is not a folder; give the folder of a run"
  ]
