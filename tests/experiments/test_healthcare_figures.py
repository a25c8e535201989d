"""The healthcare paper's figures: tables of sweeps' folders, and which model is better where."""

import json

import pandas as pd
import pytest

from experiments.healthcare_paper import figures


def write_sweep(folder, kind, arm, sources):
  """A sweep of two runs at hospitals a and b: federation .8 and .6, alone .7 and .7 at run 0."""
  rows = []
  for run in (0, 1):
    place = folder / f"{kind.name}_{arm}" / "points" / f"{run:05d}"
    place.mkdir(parents=True)
    lines = [
      {"round": number, "split": split, kind.metric: 0.5 + number / 10 + run / 100}
      | {"epsilon_max": None if arm == "plain" else number}
      for number in (0, 2)
      for split in ("test", "train")
    ]
    text = "\n".join(map(json.dumps, lines))
    (place / "metrics.jsonl").write_text(text, encoding="utf-8")
    for hospital, federation in (("a", 0.8), ("b", 0.6)):
      rows.append(
        {"point": run, "hospital": hospital, "num_train": 9, "num_test": 3, "epsilon": 1.0}
        | {"privacy.target_epsilon": 8.0, "data.source": sources[kind.name]}
        | {kind.metric: federation + run / 100, f"all.{kind.metric}": 0.65}
        | {f"alone.{kind.metric}": 0.7 + run / 100, f"alone.all.{kind.metric}": 0.55}
      )
  pd.DataFrame(rows).to_csv(folder / f"{kind.name}_{arm}" / "results.csv", index=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("figures")
  names = ("records", "images", "wearables", "drugs")
  sources = dict(zip(names, ("heart_disease", "br35h", "series", "gdsc"), strict=True))
  for kind in figures.KINDS:
    for arm in figures.ARMS:
      write_sweep(folder, kind, arm, sources)
  figures.main(["figures", str(folder), str(folder / "figures")])
  return folder / "figures"


def test_tables_hold_test_scores_of_each_run_and_both_figures_are_drawn(written):
  rounds = pd.read_csv(written / "rounds.csv")
  assert len(rounds) == 4 * 2 * 2 * 2  # kinds, arms, runs and log points
  assert rounds["score"].tolist()[:4] == [0.5, 0.7, 0.51, 0.71]
  assert rounds.groupby("privacy")["epsilon_max"].max().fillna(-1).to_dict() == {
    "plain": -1,
    "private": 2,
  }
  for name in ("accuracy_by_rounds.png", "local_against_global.png"):
    assert (written / name).read_bytes().startswith(b"\x89PNG")


def test_wearables_are_compared_on_all_test_people_and_others_on_the_hospitals_own(written):
  hospitals = pd.read_csv(written / "hospitals.csv")
  first = hospitals[hospitals["run"] == 0].groupby(["kind", "hospital"]).first()
  assert list(first.loc[("wearables", "a"), ["federation", "alone"]]) == [0.65, 0.55]
  assert list(first.loc[("images", "b"), ["federation", "alone"]]) == [0.6, 0.7]


def test_a_lower_error_of_drugs_counts_as_better(written):
  rounds, hospitals = (pd.read_csv(written / f"{name}.csv") for name in ("rounds", "hospitals"))
  found = figures.summary(rounds, hospitals).set_index(["kind", "privacy"])
  assert list(found.loc[("drugs", "plain"), ["better", "worse"]]) == [1, "a"]
  assert list(found.loc[("records", "plain"), ["better", "worse"]]) == [1, "b"]
  assert list(found.loc[("wearables", "private"), ["better", "worse"]]) == [2, ""]
