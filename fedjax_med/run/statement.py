"""The privacy statement of a run, written from the files of its workdir."""

import math
import pathlib
from typing import Any

from fedjax_med.core.errors import require
from fedjax_med.data.modality import modality_of, worded
from fedjax_med.folder.data_notes import patient_note
from fedjax_med.folder.reading import read_json
from fedjax_med.folder.writing import write_text
from fedjax_med.privacy import claims
from fedjax_med.privacy.guarantees import statistics_gap
from fedjax_med.privacy.statement import write_out


def read_audit(workdir: pathlib.Path) -> dict[str, Any] | None:
  """audit.json, if there is one; UserError where it is of another run."""
  path = workdir / "audit.json"
  if not path.exists():
    return None
  found, own = read_json(path), read_json(workdir / "config.json").get("run_id")
  require(
    found.get("run_id") == own,
    f"{path} is of run {found.get('run_id')}, the folder of run {own}",
    "remove it, or run python -m fedjax_med.audit with this --workdir again",
  )
  return found


def write_statement(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/privacy_statement.md from privacy.json, and audit.json if there is one.

  Raises:
    UserError: a file is missing or is not what a run writes, or privacy.json does not follow from
      the ledger.
  """
  path = workdir / "privacy_statement.md"
  write_text(path, statement_text(workdir))
  return path


def statement_text(workdir: pathlib.Path) -> str:
  """Text of the privacy statement; see ``write_statement``."""
  record, config = claims.read(workdir), read_json(workdir / "config.json")
  held, unit = read_json(workdir / "hospitals.json"), config["config"]["privacy"]["unit"]
  patients = patient_note(held, unit).text
  text = write_out(record, config["run_id"], read_audit(workdir), patients)
  text = worded(text, modality_of(config))
  if "table" in held:
    text += f"\n{_table_sentences(held['table'], bool(record['guarantees']))}"
  if "targets" in held:
    text += f"\n{_target_sentences(held, bool(record['guarantees']))}"
  if "series" in held:
    text += f"\n{_series_sentences(held['series'], bool(record['guarantees']))}"
  if not record["guarantees"] and "released" in held:  # else privacy.json lists it
    text += f"\n## What hospitals tell besides\n\n{statistics_gap(held['released'])}\n"
  exchange = config.get("exchange")  # folders of versions up to 0.2.0 do not say
  return (
    text
    if exchange is None
    else f"{text}\n{_exchange_sentences(exchange, bool(record['guarantees']))}"
  )


def _table_sentences(table: dict[str, Any], private: bool) -> str:
  """What the preparation of a table tells of it, as a section of the statement."""
  counted = " ε counts none of it." if private else ""
  scaling = {
    "ranges": "Numbers are scaled by the ranges of the manifest, which follow from no record.",
    "federated": "Numbers are scaled by statistics of the training records of all hospitals.",
    "hospital": "Each hospital scales its numbers by its own statistics, which do not leave it.",
  }[table["scaling"]]
  return (
    "## What the preparation of the table tells\n\n"
    f"{scaling}\n\n"
    "hospitals.json tells, exactly and without noise, which share of each column is missing at each"
    " hospital, how many values were outside their range or of no listed category, how many records"
    f" were left out and why, and how many are equal.{counted}\n"
  )


def _target_sentences(held: dict[str, Any], private: bool) -> str:
  """What hospitals.json tells of numbers, labels or times to predict, as a section."""
  counted = " ε counts none of it." if private else ""
  times = ""
  if held.get("table", {}).get("survival"):
    times = ", and how many times were 0 or less and how many events after the horizon"
  return (
    "## What the preparation of the targets tells\n\n"
    "hospitals.json tells, exactly and without noise, how many values are known, which share of"
    f" them is missing at each hospital, and which targets are left out{times}.{counted}\n"
  )


def _series_sentences(series: dict[str, Any], private: bool) -> str:
  """What the preparation of a series tells of it, as a section of the statement."""
  counted = " ε counts none of it." if private else ""
  overlap = -(-series["length"] // series["hop"])
  shared = f", and a sample stands in up to {overlap} of them" if overlap > 1 else ""
  return (
    "## What the preparation of the series tells\n\n"
    "Windows are scaled each by itself or by declared ranges, which follow from nobody's"
    f" recordings. A person has many windows{shared}: with the unit record a person, or a sample,"
    " is protected less than ε says; with the unit patient all windows of a person are one"
    " unit.\n\n"
    "hospitals.json tells, exactly and without noise, how many recordings and seconds there are,"
    " how many values were missing or outside the ranges, and in how many recordings a channel was"
    f" empty or constant.{counted}\n"
  )


def _exchange_sentences(exchange: dict[str, Any], private: bool) -> str:
  """The section on transforms of updates and on the messages that the server sees."""
  changed = ", ".join(exchange["transforms"])
  how = f"Updates pass through {changed} on their way. " if changed else ""
  packed = exchange.get("compression", {})  # older folders do not say
  if "up" in packed:
    how += f"Updates are compressed by sending {packed['up']}. "
  if "down" in packed:
    how += f"Hospitals get the model as {packed['down']}. "
  if packed and private:
    how += (
      "ε is the same as without compression: records are noised before it, and updates of whole"
      " hospitals are clipped and noised after it. "
    )
  return (
    "## What the server sees\n\n"
    f"{how}The server sees {exchange['server_sees']} and joins them by {exchange['aggregator']}.\n"
    f"{_grid_sentences(exchange)}{_mask_sentences(exchange)}{_ckks_sentences(exchange)}"
    f"{_robust_sentences(exchange)}"
  )


def _grid_sentences(exchange: dict[str, Any]) -> str:
  """How updates became whole numbers, if they did."""
  grid = exchange.get("grid")
  if grid is None:
    return ""
  step = f"2^{-math.log2(grid['scale']):g}"
  if "shared_noise" in exchange:
    return (
      f"\nEvery update is clipped to the l2 norm {grid['range']:g}, rounded by chance to multiples"
      f" of {step} and noised at its hospital. Sums are taken modulo 2^{grid['bits']}; with room"
      " for 8 standard deviations of the noise a sum hardly ever wraps, which would cost utility"
      " and no ε.\n"
    )
  weighed = "weighed and " if exchange["counted"] else ""
  return (
    f"\nEvery number of an update is cut to ±{grid['range']:g}, {weighed}rounded by chance to"
    f" a multiple of {step}; sums are taken modulo 2^{grid['bits']} and"
    " cannot wrap.\n"
  )


def _mask_sentences(exchange: dict[str, Any]) -> str:
  """Who sees what under secure aggregation."""
  if exchange["protocol"] != "masking":
    return ""
  fewest, hospitals = exchange["fewest"], exchange["grid"]["num_clients"]
  drawn = (
    "The run drew them, added them and took them off again."
    if exchange["masks"] == "executed"
    else "The run left them out, since they cancel exactly in the sum."
  )
  told = (
    " It also learns which hospitals took part and the weight of each, and of all together how many"
    " numbers were cut."
    if exchange["counted"]
    else " It also learns which hospitals took part."
  )
  alone = (
    " If all hospitals of a sum but one put their updates together, they know the last one's. The"
    " sum is exact: it may tell of a patient what any model tells, and only noise bounds that."
  )
  if "shared_noise" in exchange:
    alone = (
      " All hospitals but one together see the last one's update under its own share of the noise"
      " alone, for which no ε is stated; ε holds against the server and"
      f" {exchange['shared_noise']['colluders']} of them."
    )
  return (
    "\nMasks hide each update (secure aggregation, Bonawitz et al. 2017). The server, and whoever"
    f" reads its messages, learns sums over at least {fewest} of {hospitals} hospitals."
    f"{told}{alone}\n"
    f"\nThe masks are those of a simulation. {drawn} Their generator (threefry) is not certified"
    " for secrecy, the process that simulates the hospitals has all updates, and the server is"
    " taken to follow the protocol.\n"
  )


def _ckks_sentences(exchange: dict[str, Any]) -> str:
  """What encryption hides, and from whom."""
  if "ckks" not in exchange:
    return ""
  ckks = exchange["ckks"]
  primes = ", ".join(map(str, ckks["primes"]))
  sentences = [
    f"Updates are encrypted by CKKS (degree {ckks['degree']}, primes of {primes} bits: 128-bit"
    " security) with one public key, and the server adds ciphertexts. All CKKS keys are shared: one"
    " secret key opens the sum and every single update alike. It is held by one party, the key"
    " holder, who is neither the server nor a hospital, decrypts the sum of each round and gives it"
    " to the server. Whoever has both the secret key and a hospital's ciphertext reads its update.",
    "CKKS is approximate: its results differ from the true ones by an error that depends on the"
    " secret key, and publishing them leaks noise of the key (Li and Micciancio 2021). Here the key"
    " holder rounds each sum to the whole numbers that hospitals sent, which takes the error away,"
    " before anybody sees it; the unrounded sum must not be published.",
  ]
  if ckks["may_be_one"]:
    sentences.append(
      "Hospitals take part at random: where only one does, the sum of the round is its update."
    )
  if ckks["noise"]:
    sentences.append(
      "The noise of DP-FedAvg is added to the decrypted sum. The key holder sees the sum without"
      " noise, so it is the one whom the guarantee trusts, and has to add the noise before anybody"
      " else sees the sum."
    )
  if not ckks["executed"]:
    sentences.append("In this simulation encryption was modelled: nothing was encrypted.")
  return "\n" + "\n\n".join(sentences) + "\n"


def _robust_sentences(exchange: dict[str, Any]) -> str:
  """What a robust rule, and hostile hospitals, mean for the promise; "" without them."""
  sentences = []
  if "pre" in exchange:
    sentences.append(f"Before that the server applies {exchange['pre']} to all updates.")
  if exchange.get("weights_ignored"):
    sentences.append(
      "Every hospital counts the same, whatever its weight. What the rule does with updates that"
      " carry noise is computed from them alone, so that the ε of records and patients stays as it"
      " is."
    )
  if "attack" in exchange:
    names = ", ".join(exchange["attack"]["hospitals"])
    sentences.append(
      f"The run simulates an attack ({exchange['attack']['kind']}) of {names}. An attacker's own"
      " records are protected as far as it runs the mechanism; what it does with the updates of"
      " others costs those no ε."
    )
  return f"\n{' '.join(sentences)}\n" if sentences else ""
