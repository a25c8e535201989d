"""Sentences about a run's data that console, report and privacy statement show."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_med.data.files import SYSTEM, counted
from fedjax_med.data.grey import FEW_LEVELS, Grey
from fedjax_med.data.modality import modality_of
from fedjax_med.data.patients import PatientCounts, described
from fedjax_med.data.table_files import NO_TABLE
from fedjax_med.privacy.guarantees import statistics_gap


class Note(NamedTuple):
  """A sentence about the data.

  Attributes:
    text: the sentence.
    warning: whether results may mislead whoever does not know it.
  """

  text: str
  warning: bool


def data_notes(held: dict[str, Any], unit: str, show_names: bool) -> list[Note]:
  """Sentences about the data of a run, from hospitals.json.

  Args:
    held: the record; fields that an older version did not write are passed over.
    unit: ``privacy.unit``.
    show_names: whether a file may be named: of private runs none is.
  """
  split, noun = held["split"], modality_of(held).noun
  notes = [patient_note(held, unit)]
  if "grey" in held:
    grey = Grey(**held["grey"])
    notes.append(Note(grey.described, False))
    if grey.blank:
      notes.append(Note(f"{number(grey.blank, 'picture')} of one grey value: blank.", True))
    if grey.levels < FEW_LEVELS:
      text = f"Half of the pictures have at most {grey.levels} different grey values"
      notes.append(Note(f"{text}: they may have been exported with too few.", True))
  if "table" in held:
    notes += _table_notes(held)
  if held.get("table", {}).get("survival"):
    notes += _survival_notes(held)
  elif "targets" in held:
    notes += _target_notes(held["targets"])
  if "released" in held:
    notes.append(Note(statistics_gap(held["released"]), True))
  if "series" in held:
    notes += _series_notes(held)
  if split["scheme"] == "given":
    text = "Train and test sides are those that the data give (validation counts as train)."
    named = held.get("series", {}).get("test_persons", [])
    text = f"Test are the people of data.test_persons: {', '.join(named)}." if named else text
    notes.append(Note(text, False))
  if visiting := held.get("visiting"):
    named = ", ".join(f"'{name}' at '{where}'" for name, where in visiting.items())
    text = f"Who is in test only trains nowhere, and is tested in the row of a hospital: {named}"
    notes.append(Note(f"{text}.", False))
  sites = held.get("sites", {"count": 0, "are_hospitals": False})
  if sites["count"] and not sites["are_hospitals"]:
    text = f"{number(sites['count'], 'site')} named by the data are not the hospitals here"
    notes.append(Note(f"{text}: partition.scheme deals their {noun}s anew.", False))
  if held.get("num_elsewhere"):
    text = f"{number(held['num_elsewhere'], noun)} at another hospital than its site"
    reason = "it is kept together with near-duplicates or images of the patient there"
    reason = reason if noun == "image" else f"it is kept together with {noun}s of the patient there"
    notes.append(Note(f"{text}: {reason}.", True))
  shared = split.get("num_test_of_train_patients", 0)
  if shared:
    text = f"{number(shared, f'test {noun}')} of patients who are in train as well"
    notes.append(Note(f"{text}: the score will be optimistic.", True))
  notes += _contradictions(held, show_names)
  shifts = held.get("mixture_shifts", {})
  if shifts:
    moved = number(held["num_moved"], f"train {noun}")
    worst = max(shifts, key=lambda name: shifts[name])
    text = (
      f"{moved} moved to {number(len(shifts), 'hospital')} under"
      " partition.min_client_size; the class mixture there differs from what was drawn by"
      f" {sum(shifts.values()) / len(shifts):.2f} on average (total variation, 0 to 1), at most"
      f" {shifts[worst]:.2f} ('{worst}')."
    )
    notes.append(Note(text, shifts[worst] > 0.1))
  noun = noun if "table" in held else "file"
  return [*notes, *_left_out(held["skipped"], show_names, noun)]


def _table_notes(held: dict[str, Any]) -> list[Note]:
  """How records of a table became inputs, and what may mislead about them."""
  table, notes = held["table"], []
  for told, text in ((table["outside"], "outside the range"), (table["unknown"], "of no category")):
    parts = [f"'{name}' {count:,}" for name, count in told.items()]
    end = "cut to it" if text == "outside the range" else "taken for other"
    if parts:
      notes.append(Note(f"Values {text} that the manifest gives, {end}: {', '.join(parts)}.", True))
  for name, columns in table["absent"].items():
    notes.append(Note(f"{name} has no column {', '.join(columns)}: missing there.", True))
  if table["unlisted"]:
    text = f"Columns that the manifest does not name, not read: {', '.join(table['unlisted'])}"
    notes.append(Note(f"{text}.", False))
  for name, shares in table["missing"].items():
    whole = [column for column, share in shares.items() if share == 1]
    if whole and not any(set(whole) <= set(columns) for columns in table["absent"].values()):
      notes.append(Note(f"No value of {', '.join(whole)} at '{name}'.", False))
  equal = held["split"]["num_in_duplicate_groups"]
  if equal and held["split"]["scheme"] != "pairs":  # which has every record twice
    groups = held["split"]["num_duplicate_groups"]
    text = (
      f"{number(equal, 'record')} equal to another one in all columns ({number(groups, 'group')})"
    )
    notes.append(Note(f"{text}: they may be of different people and are not kept together.", False))
  classes = [] if len(held["class_names"]) == 1 or "survival" in table else held["hospitals"]
  for hospital in classes:
    seen = [name for name, n in zip(held["class_names"], hospital["train"], strict=True) if n]
    if len(seen) == 1:
      text = f"'{hospital['name']}' has training records of one class only"
      notes.append(Note(f"{text} ({seen[0]}): a model trained there alone learns nothing.", True))
  if table["scaling"] == "hospital":
    text = "Each hospital scales numbers by its own mean and deviation (data.scaling=hospital)"
    notes.append(Note(f"{text}: equal values become different inputs, and scores fall.", True))
  return notes


def _survival_notes(held: dict[str, Any]) -> list[Note]:
  """How times and events became targets, and the hospitals that have no event to learn from."""
  told, notes = held["table"]["survival"], []
  time, event = held["targets"]["names"]
  sides = [[row[side] for row in held["hospitals"]] for side in ("train", "test")]
  place = held["class_names"].index("event")
  counts = [sum(row[place] for row in rows) for rows in sides]
  text = f"Predicted: '{event}' after '{time}' (data.survival={told['loss']})"
  notes.append(Note(f"{text}; {counts[0]:,} events in train, {counts[1]:,} in test.", False))
  if told["early"]:
    text = f"{number(told['early'], 'record')} with a time of 0 or less"
    notes.append(Note(f"{text}, taken for the smallest positive one ({told['smallest']:g}).", True))
  if told["late"]:
    text = f"{number(told['late'], 'record')} with an event after the horizon"
    notes.append(Note(f"{text}: counted as survivors of all intervals.", True))
  without = [row["name"] for row in held["hospitals"] if not row["train"][place]]
  effect = {"cox": "its loss has no gradient", "hazards": "it teaches survival only"}[told["loss"]]
  for name in without:
    notes.append(Note(f"'{name}' has no event among its training records: {effect}.", True))
  return notes


def _target_notes(targets: dict[str, Any]) -> list[Note]:
  """How many numbers there are to predict, and which of them nobody can learn."""
  names, unit = targets["names"], f" ({targets['unit']})" if targets["unit"] else ""
  what = ", ".join(names) if len(names) <= 4 else f"{len(names)} numbers"
  text = f"Predicted: {what}{unit}; {number(targets['known'], 'known value')} of them"
  notes = [Note(f"{text}, missing ones count in no loss and no metric.", False)]
  for reason in sorted({reason for _, reason in targets["left_out"]}):
    left = [name for name, other in targets["left_out"] if other == reason]
    text = f"Left out: {number(len(left), 'target')}, {reason}, such as {left[0]}"
    notes.append(Note(f"{text}.", True))
  return notes


def _series_notes(held: dict[str, Any]) -> list[Note]:
  """How windows were cut from recordings, and what may mislead about them."""
  series, split = held["series"], held["split"]
  rate = series["rate"]
  text = (
    f"Windows of {series['length'] / rate:g} seconds, one every {series['hop'] / rate:g} seconds,"
    f" of {number(series['recordings'], 'recording')} ({series['seconds']:,.0f} seconds) at"
    f" {rate:g} samples a second; channels {', '.join(series['channels'])}. In no window are"
    f" {series['left_over']:,.0f} seconds."
  )
  notes = [Note(text, False)]
  overlap, total = series["test_overlapping"], split["num_test"]
  if overlap:
    text = f"{number(overlap, 'test window')} of {total:,} ({overlap / max(1, total):.0%})"
    notes.append(Note(f"{text} overlap a training window: the score will be optimistic.", True))
  for key, text in (
    ("resampled", "of another rate, resampled linearly"),
    ("padded", "shorter than a window, padded at the end with masked samples"),
  ):
    if series[key]:
      notes.append(Note(f"{number(series[key], 'recording')} {text}.", key == "padded"))
  if series["alone"]:
    text = f"{number(series['alone'], 'patient')} with one recording"
    notes.append(Note(f"{text}, which is on one side as a whole.", True))
  for key, text in (
    ("bridged", "Missing values, drawn in linearly"),
    ("empty", "Recordings without a value of a channel, masked"),
    ("constant", "Recordings in which a channel never changes"),
    ("outside", "Values of windows outside data.ranges, cut to them"),
  ):
    if series[key]:
      parts = ", ".join(f"'{name}' {count:,}" for name, count in series[key].items())
      notes.append(Note(f"{text}: {parts}.", True))
  equal = split["num_in_duplicate_groups"]
  if equal:
    text = f"{number(equal, 'window')} equal to another one in every value"
    notes.append(Note(f"{text}: they are not kept together.", True))
  return notes


def number(count: int, noun: str) -> str:
  """A count with its noun."""
  return f"{count:,} {noun}{'' if count == 1 else 's'}"


def patient_note(held: dict[str, Any], unit: str) -> Note:
  """A sentence on how many names say their patient."""
  images = sum(sum(row["train"]) + sum(row["test"]) for row in held["hospitals"])
  known = held.get("patients")
  counts = PatientCounts(**known) if known else None
  by_site = held.get("sites", {}).get("are_hospitals", False)
  text = described(counts, images, by_site, modality_of(held).nouns)
  if counts is None:
    group = " Protected is a group of near-duplicates, which is less than a patient."
    return Note(text + (group if unit == "group" else ""), unit == "group")
  return Note(text, counts.named != images or (counts.shared > 0 and by_site))


def _contradictions(held: dict[str, Any], show_names: bool) -> list[Note]:
  found = held.get("contradictions")
  if not found or not found["similar"] or "targets" in held:  # groups contradict nobody
    return []
  if not modality_of(held).keeps_copies:
    where = "all columns" if "table" in held else "every value"
    text = f"{number(found['identical'], modality_of(held).noun)} equal in {where} to one of"
    return [Note(f"{text} another class.", False)]
  more = found["similar"] - found["identical"]
  named = ""
  if show_names:
    first, second = found["pairs"][0]
    named = f", such as {first} and {second}"
  notes = []
  if found["identical"]:
    text = f"{number(found['identical'], 'picture')} with an equal one in another class{named}"
    notes.append(Note(f"{text}: not all of these labels can be right.", True))
    named = ""
  if more:
    text = f"{number(more, 'picture')} with a near-duplicate in another class{named}"
    notes.append(Note(f"{text}: look whether their labels are right.", True))
  return notes


def _left_out(skipped: Sequence[Sequence[str]], show_names: bool, noun: str) -> list[Note]:
  """Numbers of files or records left out, by class and reason; the system's by themselves."""
  system = sum(row[1] == SYSTEM for row in skipped)
  rows = [row for row in skipped if row[1] != SYSTEM]
  notes = []
  if noun != "file":
    others = [row for row in rows if row[1] == NO_TABLE]
    rows = [row for row in rows if row[1] != NO_TABLE]
    if others:
      named = f", such as {others[0][0]}" if show_names else ""
      text = f"Left out as {NO_TABLE}: {number(len(others), 'file')}{named}"
      notes.append(Note(f"{text}.", True))
  if rows:
    by_class: dict[str, list[str]] = {}
    for row in rows:
      by_class.setdefault(row[2] if len(row) > 2 else "", []).append(row[1])
    parts = [
      counted(by_class[name])  # a record has no class if its target is missing
      if noun != "file"
      else f"{len(by_class[name])} {f'of class {name}' if name else 'of no class'},"
      f" {counted(by_class[name])}"
      for name in sorted(by_class)
    ]
    named = f", for example {rows[0][0]}" if show_names else ""
    notes.append(Note(f"Left out: {number(len(rows), noun)}, {'; '.join(parts)}{named}.", True))
  if system:
    notes.append(Note(f"Left out as {SYSTEM}: {number(system, 'file')}.", False))
  return notes
