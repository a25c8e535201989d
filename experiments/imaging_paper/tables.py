"""Tables 1 to 3 of the imaging paper, the paper's number beside ours, random and grouped split.

Table 1 is of Br35H and table 2 of SARS-CoV-2-CT: the same rows, chosen by --set.

python -m experiments.imaging_paper.tables --scale=smoke --json
python -m experiments.imaging_paper.tables --scale=cpu --set=br35h --path=FOLDER
"""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from experiments.imaging_paper import training
from experiments.imaging_paper.systems import SCALES, SPLITS, SYSTEMS
from fedjax_med.flags import run_main
from fedjax_med.folder.writing import write_text, write_whole
from fedjax_med.study import mean_interval

HIGH = 0.9  # accuracy that near-duplicates are asked to explain
METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "auroc", "ece")
TITLES = {
  "tables 1 and 2": "Ablation (tables 1 and 2)",
  "table 3": "Comparison (table 3)",
  "figures 3 and 4": "Architectures (figures 3 and 4)",
  "unlike hospitals": "Ways to meet unlike hospitals",
}


def summarise(frame: pd.DataFrame, dataset: str) -> list[dict[str, Any]]:
  """A record a system, in the order of ``SYSTEMS``, ready for JSON.

  ``splits`` has n, missing (diverged), mean, low and high (95% t interval over seeds, cut at 0 and
  1) of every metric; ``random_minus_grouped`` the same of the accuracies' difference, seed by seed;
  ``difference`` is ours of the random split, as the paper's, minus ``published``, None where the
  paper's is unknown.
  """
  found = []
  for name, system in SYSTEMS.items():
    own = frame[frame["system"] == name]
    if own.empty:
      continue
    splits = {
      split: {metric: _stats(own[own["split"] == split][f"all.{metric}"]) for metric in METRICS}
      for split in SPLITS
    }
    reached = splits["paper"]["accuracy"]["mean"]
    by_seed = own.pivot(index="seed", columns="split", values="all.accuracy")
    published = system.published.get(dataset)
    found.append(
      {
        "system": name,
        "label": system.label,
        "what": system.what,
        "places": list(system.places),
        "parameters": int(own["parameters"].iloc[0]),
        "predicts": own["predicts"].iloc[0],
        "published": published,
        "difference": None if None in (reached, published) else reached - published,
        "random_minus_grouped": _stats(by_seed["paper"] - by_seed["grouped"], -1),
        "splits": splits,
      }
    )
  return found


def _stats(values: pd.Series, least: float = 0) -> dict[str, Any]:
  found = mean_interval(values.to_numpy(float), bounds=(least, 1))
  numbers = {name: found[name] for name in ("mean", "low", "high")}
  counts = {"n": found["n"], "missing": found["missing"]}
  return counts | {k: None if math.isnan(v) else v for k, v in numbers.items()}


def markdown(records: list[dict[str, Any]], place: str) -> str:
  """One of the tables, accuracy first."""
  lines = [
    "| system | parameters | paper | ours, random split | difference | ours, grouped split |"
    " random minus grouped | F1, grouped | AUROC, grouped |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for record in records:
    if place not in record["places"]:
      continue
    random, grouped = (record["splits"][split] for split in SPLITS)
    cells = [
      f"{record['label']}{mark(record)} ({record['what']})",
      f"{record['parameters']:,}",
      "unknown" if record["published"] is None else f"{record['published']:.3f}",
      interval(random["accuracy"]),
      "–" if record["difference"] is None else f"{record['difference']:+.3f}",
      interval(grouped["accuracy"]),
      interval(record["random_minus_grouped"], "+.3f"),
      interval(grouped["f1"]),
      interval(grouped["auroc"]),
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def mark(record: dict[str, Any]) -> str:
  """A star for systems whose hospitals predict with models of their own."""
  return " *" if record["predicts"] == "own models" else ""


def interval(stats: dict[str, Any], form: str = ".3f") -> str:
  """Mean [low, high] and how many diverged, or what there is of it."""
  if stats["mean"] is None:
    return "diverged"
  text = format(stats["mean"], form)
  if stats["low"] is not None:
    text += f" [{stats['low']:{form}}, {stats['high']:{form}}]"
  if stats["missing"]:
    text += f" ({stats['missing']} of {stats['n'] + stats['missing']} diverged)"
  return text


def caption() -> str:
  """What was run, in a sentence."""
  values = flags.FLAGS
  size = SCALES[values.scale]
  return (
    f"Set {values.set}, scale {values.scale}: {size.image_size} pixels, width {size.width:g},"
    f" {size.rounds} rounds of one local epoch, {size.seeds} seeds; accuracy unless another metric"
    " is named, mean and 95% t interval over the seeds. The paper's numbers are of full size and"
    " of its own random split; those that are unknown were not available to us. * Each hospital"
    " predicts its own test images with a model of its own, which also learns how common each class"
    " is there: not to be held against a global model. Seeds share images, so that intervals are"
    " narrower than those of new data would be."
  )


def main(_: list[str]) -> None:
  systems = training.chosen()
  frame = training.results(systems)
  records = summarise(frame, flags.FLAGS.set)
  text = [caption(), leakage(frame)]
  for place, title in TITLES.items():
    if any(place in record["places"] for record in records):
      text += [f"## {title}", markdown(records, place)]
  if len(systems) == len(SYSTEMS):  # else what is whole would be overwritten
    folder = training.committed().parent if flags.FLAGS.committed else training.workdir()
    table = pd.json_normalize(records, sep=".").drop(columns=["what", "places"])
    table = table.assign(set=flags.FLAGS.set, scale=flags.FLAGS.scale)
    write_whole(folder / training.RESULTS, lambda path: frame.to_csv(path, index=False))
    write_whole(folder / "tables.csv", lambda path: table.to_csv(path, index=False))
    write_text(folder / "tables.md", "\n\n".join(text) + "\n")
    write_text(folder / "tables.tex", latex(records))
  if flags.FLAGS.json:
    print(json.dumps({"scale": flags.FLAGS.scale, "set": flags.FLAGS.set, "rows": records}))
  else:
    print("\n\n".join(text))


def leakage(frame: pd.DataFrame, above: float = HIGH) -> str:
  """What the systems whose mean accuracy is over ``above`` on the random split reach on both.

  Of global models: hospitals' own models also know how common each class is at home.
  """
  frame = frame[frame["predicts"] == "global model"]
  if frame.empty:
    return "No system has a global model."
  values = frame.pivot(index="system", columns=["split", "seed"], values="all.accuracy")
  random, grouped = (values[[split]].to_numpy() for split in SPLITS)  # [systems, seeds]
  high = random.mean(1) > above  # not with a seed that diverged
  said = f"{high.sum()} of {len(values)} global models are over {above:.2f} on the random split"
  if not high.any():
    return f"{said}."
  random, grouped = random[high], grouped[high]
  best, means = np.nanmax(np.nanmean(grouped, 1)), (np.nanmean(random), np.nanmean(grouped))
  pairs = zip(np.nanmean(random, 0), np.nanmean(grouped, 0), strict=True)
  seeds = ", ".join(f"{one:.2f} and {other:.2f}" for one, other in pairs)
  return (
    f"{said}; the best of them is at {best:.2f} on the grouped one. Their mean is {means[0]:.2f}"
    f" and {means[1]:.2f}; seed by seed {seeds}."
  )


def latex(records: list[dict[str, Any]]) -> str:
  """All systems as one LaTeX table (package booktabs), its caption that of the others."""
  rows = [
    {
      "System": record["label"] + mark(record),
      "Paper": "--" if record["published"] is None else f"{record['published']:.3f}",
      "Random split": interval(record["splits"]["paper"]["accuracy"]),
      "Grouped split": interval(record["splits"]["grouped"]["accuracy"]),
      "F1, grouped": interval(record["splits"]["grouped"]["f1"]),
    }
    for record in records
  ]
  said = caption().replace("%", r"\%").replace("_", r"\_")
  return pd.DataFrame(rows).to_latex(index=False, caption=said)


if __name__ == "__main__":
  training.define_flags()
  flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
  run_main(main)
