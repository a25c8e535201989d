"""The privacy ledger of a run: which private mechanisms were executed, and ε from that alone.

``ledger.jsonl`` grows line by line. Its first line names the mechanisms of every guarantee. Each
further line is one of three: how often each mechanism was executed after some round, with the ε
that was told of it; software and settings of the run (``Ran``); releases of its baselines. A line
carries the digest of itself and of the line before it, so that an edit shows. The digest is no
signature: it protects against mistakes, not against a person who recomputes all digests.

A round that a resumed run repeats is the same release (same sample, same noise) and gets no line.

Lines that do not follow from those before them make a ledger that nobody reads any more. A run that
is resumed may set them apart where that hides no release: see ``run/ledger_repair.py``.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_med.core.errors import UserError, require
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.guarantees import UNITS, Guarantee, shared_noise, shares_of, spent
from fedjax_med.privacy.mechanism import Mechanism, PoissonGaussian

FILE = "ledger.jsonl"
RESTORE = "restore the file; without it no ε can be claimed for this run"
SAMPLER = (
  "poisson: float32 uniform < float32(sampling_probability); a larger draw cut to a uniform subset"
  " of batch_cap; with b coefficients step t of a hospital draws from slots s = t modulo b alone"
)
_LOCAL = "threefry2x32, folded from the run's key: {stream}, client, round, local step"
KEYS = {
  "record": _LOCAL.format(stream="1 (sample) or 2 (noise)"),
  "group": _LOCAL.format(stream="1 (sample) or 2 (noise)"),
  "patient": _LOCAL.format(stream="1 (sample) or 2 (noise)"),
  "client": "threefry2x32, folded from the run's key: 3 (sample) or 6 (noise), round",
}
SHARED_SAMPLER = (
  "all hospitals in every round; noise of whole numbers, by the alias method from 96 bits a draw"
)
SHARED_KEYS = (
  "threefry2x32, folded from the run's key: 9 (exchange), 0, client, round, 0, place among the"
  " transforms before the masks, 1 (noise), level of draws"
)

Counts = tuple[tuple[int, ...], ...]
Epsilons = tuple[tuple[float, ...], ...]


class Ran(NamedTuple):
  """Software and settings that execute a run's mechanisms, as far as its claims depend on them.

  Attributes:
    fedjax_med: version of this package.
    dp_accounting: version of the library that the accountant is from.
    clipping: how gradients are clipped: two_pass, book_keeping, reference or none.
    baselines: whether baselines are trained on the same records.
    statistics: names of statistics of the training records that hospitals tell exactly.
  """

  fedjax_med: str
  dp_accounting: str
  clipping: str
  baselines: bool
  statistics: tuple[str, ...] = ()


class Spent(NamedTuple):
  """Releases of the mechanisms of a run, or of one of its baselines.

  Attributes:
    guarantees: guarantee of each kind of unit; empty without privacy.
    counts: releases of each party of each guarantee that were executed.
    epsilons: ε of each party of each guarantee, as it was told; None in ledgers of 0.2.0.
  """

  guarantees: tuple[Guarantee, ...]
  counts: Counts
  epsilons: Epsilons | None


class Ledger(NamedTuple):
  """The content of a ledger.

  Attributes:
    run_id: fingerprint of the run.
    spent: releases that were executed by the last line.
    rounds_at: finished rounds at every line, in order.
    told: ε of each party of each guarantee that was told, by rounds; none in ledgers of 0.2.0.
    digests: of every line, in order; the last stands for the whole.
    ran: software and settings of each start, in order; empty in ledgers of 0.2.0.
    baselines: releases of each baseline that has ended, by its name.
  """

  run_id: str
  spent: Spent
  rounds_at: tuple[int, ...]
  told: dict[int, Epsilons]
  digests: tuple[str, ...]
  ran: tuple[Ran, ...]
  baselines: dict[str, Spent]

  @property
  def guarantees(self) -> tuple[Guarantee, ...]:
    """Guarantee of each kind of unit."""
    return self.spent.guarantees

  @property
  def rounds(self) -> int:
    """Rounds after the last line."""
    return self.rounds_at[-1]

  @property
  def counts(self) -> Counts:
    """Releases of each party of each guarantee that were executed by the last line."""
    return self.spent.counts

  @property
  def head(self) -> str:
    """Digest of the last line; it stands for all of them."""
    return self.digests[-1]


class Split(NamedTuple):
  """A ledger of which not every line follows from those before it.

  Attributes:
    intact: the ledger of the lines that follow from one another, from the first on.
    texts: of those lines.
    broken: texts of the others: repeated lines, and all from the first on that says anything else.
    first: number of the first of the others, from 1.
  """

  intact: Ledger
  texts: tuple[bytes, ...]
  broken: tuple[bytes, ...]
  first: int


def start(folder: pathlib.Path, run_id: str, guarantees: Sequence[Guarantee]) -> Ledger:
  """Begins the ledger of a run, or reads the one that the same run began before.

  A last line that a kill cut short is removed.

  Raises:
    UserError: the ledger was edited, or is of other mechanisms.
  """
  first = {"run_id": run_id, "guarantees": [_to_json(guarantee) for guarantee in guarantees]}
  path = folder / FILE
  if path.exists():
    with path.open("r+b") as file:
      file.truncate(file.read().rfind(b"\n") + 1)
  if not path.exists() or not path.stat().st_size:
    _append(path, "", first)
    return read(folder)
  found = {key: value for key, value in _lines(path)[0].items() if key != "digest"}
  require(
    found == json.loads(json.dumps(first)),
    f"{path} is the ledger of run {found.get('run_id')} with other mechanisms than this run's",
    "use another --workdir, or the flags and data of the first start to resume it",
  )
  return read(folder)


def record(
  folder: pathlib.Path, before: Ledger, rounds: int, counts: Sequence[Sequence[int]], ran: Ran
) -> Ledger:
  """Writes the releases of the first ``rounds`` rounds, and the software that executes them.

  The line reaches the disk before this returns. A line that is there already is not written again.

  Args:
    folder: the workdir.
    before: the ledger from ``start`` or the last ``record``. The file is not read again here; a
      change made to it meanwhile shows when it is.
    rounds: finished rounds.
    counts: releases of each party of each guarantee, in all.
    ran: software and settings that execute them from now on.

  Returns:
    The ledger with these releases.

  Raises:
    UserError: the ledger says more releases for fewer rounds.
  """
  now = _whole_numbers(counts)
  done = rounds <= before.rounds
  fewer, more = (now, before.counts) if done else (before.counts, now)
  require(
    _at_most(fewer, more),
    f"{folder / FILE} counts {_shown(before.counts)} releases after {before.rounds} rounds, the run"
    f" {_shown(now)} after {rounds}",
    "the ledger is of another run: use another --workdir",
  )
  contents = [{"ran": _ran_to_json(ran)}] if _is_news(before, ran, not done) else []
  if not done:
    contents.append(_count_line(before.guarantees, rounds, now))
  return _continued(folder / FILE, before, contents)


def record_baselines(
  folder: pathlib.Path, before: Ledger, ended: Mapping[str, Ledger | None]
) -> Ledger:
  """Writes the releases of a run's baselines that have ended.

  Args:
    folder: the workdir of the run.
    before: its ledger.
    ended: the ledger of each baseline by name; None of one that nothing protects.

  Returns:
    The ledger of the run with these releases.
  """
  nothing = Spent(guarantees=(), counts=(), epsilons=())
  found = {name: nothing if own is None else own.spent for name, own in ended.items()}
  if found == before.baselines:
    return before
  values = {
    name: {
      "guarantees": [_to_json(guarantee) for guarantee in own.guarantees],
      "counts": own.counts,
      "epsilons": _epsilons_to_json(own.epsilons or ()),
    }
    for name, own in found.items()
  }
  return _continued(folder / FILE, before, [{"baselines": values}])


def read(folder: pathlib.Path) -> Ledger:
  """Reads and verifies a ledger; a last line that a kill cut short does not count.

  Raises:
    UserError: there is none, or it was edited, with the line.
  """
  path = folder / FILE
  require(
    path.exists(),
    f"{path} is missing",
    "give the --workdir of a private run; without its ledger no ε can be claimed for it",
  )
  return _ledger(path, _lines(path))


def split(folder: pathlib.Path) -> Split | None:
  """The intact part of a ledger; None if all of it is intact, or nothing.

  A repeated line says nothing that does not stand above, and breaks no chain: two processes that
  write the same ledger leave such lines.

  Raises:
    UserError: the intact lines are not a ledger.
  """
  path = folder / FILE
  if not path.exists():
    return None
  lines, kept, broken, first = [], [], [], 0
  altered = False
  for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
    line = None if altered else _verified(text, lines[-1]["digest"] if lines else "")
    if line is None:
      altered = altered or text not in kept
      broken.append(text)
      first = first or number
    else:
      lines.append(line)
      kept.append(text)
  if not lines or not broken:
    return None
  return Split(intact=_ledger(path, lines), texts=tuple(kept), broken=tuple(broken), first=first)


def set_apart(folder: pathlib.Path, parts: Split, rounds: int, counts: Counts) -> pathlib.Path:
  """Keeps the intact lines of a ledger, moves the others to a file beside it, and returns that.

  Killed at any moment it leaves the ledger as it was or as it is to be.

  Args:
    folder: the workdir.
    parts: from ``split``.
    rounds: finished rounds that the ledger must count; a line for them is added if it lacks them.
    counts: releases of each party of each guarantee by then.
  """
  path, number = folder / FILE, 1
  while (beside := path.with_name(f"{FILE}.broken-{number}")).exists():
    number += 1
  _write(beside, parts.broken)
  told = parts.intact
  contents = []
  for ran in _ran_of(parts.broken):
    if _is_news(told, ran, goes_on=False):  # else how a release was clipped would be hidden
      contents.append({"ran": _ran_to_json(ran)})
      told = told._replace(ran=(*told.ran, ran))
  if rounds > told.rounds:
    contents.append(_count_line(told.guarantees, rounds, counts))
  texts, head = list(parts.texts), told.head
  for content in contents:
    head = _digest(head, content)
    texts.append(_line(content, head))
  whole = path.with_name(f"{FILE}.tmp")
  _write(whole, texts)
  os.replace(whole, path)
  return beside


def _ledger(path: pathlib.Path, lines: list[dict[str, Any]]) -> Ledger:
  first, *later = lines
  try:
    guarantees = tuple(_from_json(value) for value in first["guarantees"])
    counts = tuple((0,) * len(guarantee.names) for guarantee in guarantees)
    nothing = tuple((0.0,) * len(row) for row in counts)
    book = Ledger(
      run_id=first["run_id"],
      spent=Spent(guarantees=guarantees, counts=counts, epsilons=nothing),
      rounds_at=(0,),
      told={0: nothing},
      digests=(first["digest"],),
      ran=(),
      baselines={},
    )
    for number, line in enumerate(later, 2):
      after = _with_line(book, line, line["digest"])
      if after is None:
        raise UserError(f"{path}, line {number} counts fewer rounds or steps; restore the file")
      book = after
    return book
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"{path} is not a ledger ({error}); restore the file") from error


def _with_line(book: Ledger, content: dict[str, Any], digest: str) -> Ledger | None:
  """The ledger after one more line; None if that line counts less than those before."""
  rounds, own = book.rounds, book.spent
  if "ran" in content:
    book = book._replace(ran=(*book.ran, _ran_from_json(content["ran"])))
  elif "baselines" in content:
    book = book._replace(
      baselines={name: _spent_of(value) for name, value in content["baselines"].items()}
    )
  else:
    rounds, counts = content["rounds"], _whole_numbers(content["counts"])
    if rounds <= book.rounds or not _at_most(own.counts, counts):
      return None
    own = own._replace(counts=counts, epsilons=_epsilons_from_json(content.get("epsilons"), counts))
    if own.epsilons is not None:
      book = book._replace(told={**book.told, rounds: own.epsilons})
  return book._replace(
    spent=own, rounds_at=(*book.rounds_at, rounds), digests=(*book.digests, digest)
  )


def _spent_of(value: dict[str, Any]) -> Spent:
  counts = _whole_numbers(value["counts"])
  return Spent(
    guarantees=tuple(_from_json(guarantee) for guarantee in value["guarantees"]),
    counts=counts,
    epsilons=_epsilons_from_json(value["epsilons"], counts),
  )


def _count_line(guarantees: Sequence[Guarantee], rounds: int, counts: Counts) -> dict[str, Any]:
  """The line of so many rounds, with the ε of its releases."""
  epsilons = tuple(spent(*each) for each in zip(guarantees, counts, strict=True))
  return {"rounds": int(rounds), "counts": counts, "epsilons": _epsilons_to_json(epsilons)}


def _epsilons_to_json(epsilons: Epsilons) -> list[list[float | None]]:
  """ε as JSON has it, which knows no infinity."""
  return [[None if math.isinf(value) else value for value in row] for row in epsilons]


def _epsilons_from_json(
  epsilons: list[list[float | None]] | None, counts: Counts
) -> Epsilons | None:
  """ε from JSON; ValueError unless there is one for each count."""
  if epsilons is None:
    return None
  if [len(row) for row in epsilons] != [len(row) for row in counts]:
    raise ValueError("not one ε for each count")
  return tuple(tuple(math.inf if v is None else float(v) for v in row) for row in epsilons)


def _whole_numbers(counts: Sequence[Sequence[int]]) -> Counts:
  return tuple(tuple(int(count) for count in row) for row in counts)


def _is_news(book: Ledger, ran: Ran, goes_on: bool) -> bool:
  """Whether the ledger needs a line with the software and settings of this start.

  Versions alone are news where it goes on: what was told before was told with others.
  """
  if not book.ran or (goes_on and _versions(ran) != _versions(book.ran[-1])):
    return True
  known = {each.clipping for each in book.ran}
  if ran.clipping not in known or not set(ran.statistics) <= set(statistics_of(book)):
    return True
  return ran.baselines > any(each.baselines for each in book.ran)


def statistics_of(book: Ledger) -> tuple[str, ...]:
  """Names of the statistics that hospitals told at any start of a run."""
  return tuple(dict.fromkeys(name for ran in book.ran for name in ran.statistics))


def _ran_to_json(ran: Ran) -> dict[str, Any]:
  """The fields; ``statistics`` only where there are any, which older versions do not know."""
  fields = ran._asdict()
  return fields if ran.statistics else {k: v for k, v in fields.items() if k != "statistics"}


def _ran_from_json(fields: dict[str, Any]) -> Ran:
  return Ran(**{**fields, "statistics": tuple(fields.get("statistics", ()))})


def _versions(ran: Ran) -> tuple[str, str]:
  return ran.fedjax_med, ran.dp_accounting


def _ran_of(texts: Iterable[bytes]) -> list[Ran]:
  """The ``Ran`` that broken lines still show."""
  found = []
  for text in texts:
    with contextlib.suppress(ValueError, KeyError, TypeError):
      found.append(_ran_from_json(json.loads(text)["ran"]))
  return found


def require_there(folder: pathlib.Path) -> None:
  """Raises UserError where a run that goes on has no ledger: a new one would hide its releases."""
  require(
    (folder / FILE).exists(),
    f"{folder / FILE} is missing, and so does not hold the line that the newest checkpoint was"
    " saved after",
    "restore the ledger; without it no ε can be claimed for this run",
  )


def require_covers(ledger: Ledger, folder: pathlib.Path, head: str | None, rounds: int) -> None:
  """Raises UserError unless the ledger holds the line that a checkpoint was saved after.

  Args:
    ledger: of ``folder``.
    folder: the workdir.
    head: digest of that line, as the checkpoint has it.
    rounds: that the weights of the checkpoint were trained for.
  """
  remedy = "restore the ledger; without it no ε can be claimed for this run"
  require(
    head in ledger.digests,
    f"{folder / FILE} does not hold the line that the newest checkpoint was saved after",
    remedy,
  )
  counted = ledger.rounds_at[ledger.digests.index(str(head))]
  require(
    rounds <= counted,
    f"{folder / FILE} counts {counted} rounds at the line that the newest checkpoint was saved"
    f" after, whose weights were trained for {rounds}",
    remedy,
  )


def _at_most(fewer: Counts, more: Counts) -> bool:
  same = [len(row) for row in fewer] == [len(row) for row in more]
  pairs = zip(sum(fewer, ()), sum(more, ()), strict=False)
  return same and all(a <= b for a, b in pairs)


def _shown(counts: Counts) -> str:
  return "; ".join(", ".join(map(str, row[:8])) + " ..." * (len(row) > 8) for row in counts)


def _to_json(guarantee: Guarantee) -> dict[str, Any]:
  rows = zip(guarantee.names, guarantee.mechanisms, guarantee.deltas, strict=True)
  shared = shared_noise(guarantee) is not None
  return {
    "unit": guarantee.unit,
    "place": guarantee.place,
    "adjacency": UNITS[guarantee.unit].adjacency,
    "sampler": SHARED_SAMPLER if shared else SAMPLER,
    "keys": SHARED_KEYS if shared else KEYS[guarantee.unit],
    "parties": [
      {"name": name, **_numbers(mechanism), "delta": float(delta)}
      for name, mechanism, delta in rows
    ],
  }


def _from_json(value: dict[str, Any]) -> Guarantee:
  parties = value["parties"]
  return Guarantee(
    unit=value["unit"],
    names=tuple(party["name"] for party in parties),
    mechanisms=tuple(_mechanism(party) for party in parties),
    deltas=tuple(party["delta"] for party in parties),
    place=value.get("place", "federation"),
  )


def _numbers(mechanism: Mechanism) -> dict[str, Any]:
  """Fields of a mechanism, and what follows from those of hospitals' own noise."""
  fields = dataclasses.asdict(mechanism)
  return fields | shares_of(mechanism) if isinstance(mechanism, DistributedGaussian) else fields


def _mechanism(party: dict[str, Any]) -> Mechanism:
  if "colluders" in party:
    return _shared(party)
  # Ledgers of before there was correlated noise, or a count among the mechanisms.
  party = {"coefficients": [1.0], "count_noise": 0.0, **party}
  values = {field.name: party[field.name] for field in dataclasses.fields(PoissonGaussian)}
  return PoissonGaussian(**{**values, "coefficients": tuple(values["coefficients"])})


def _shared(party: dict[str, Any]) -> DistributedGaussian:
  """Hospitals' own noise; ValueError where ρ, ξ or Δ do not follow from the other numbers."""
  names = [field.name for field in dataclasses.fields(DistributedGaussian)]
  mechanism = DistributedGaussian(**{name: party[name] for name in names})
  for name, truth in shares_of(mechanism).items():
    if not math.isclose(party[name], truth, rel_tol=1e-9):
      raise ValueError(f"{name} is {party[name]}, the other numbers give {truth}")
  return mechanism


def _digest(previous: str, content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True, allow_nan=False)
  return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def _append(path: pathlib.Path, previous: str, content: dict[str, Any]) -> str:
  """Adds a line to the file on the disk, and returns its digest."""
  digest = _digest(previous, content)
  with path.open("ab") as file:
    file.write(_line(content, digest) + b"\n")
    file.flush()
    os.fsync(file.fileno())
  return digest


def _continued(path: pathlib.Path, book: Ledger, contents: Sequence[dict[str, Any]]) -> Ledger:
  """Adds lines to the file on the disk; returns the ledger with them."""
  for content in contents:
    after = _with_line(book, content, _append(path, book.head, content))
    assert after is not None
    book = after
  return book


def _line(content: dict[str, Any], digest: str) -> bytes:
  return json.dumps({**content, "digest": digest}, allow_nan=False).encode()


def _write(path: pathlib.Path, texts: Sequence[bytes]) -> None:
  """Writes lines to a file on the disk."""
  with path.open("wb") as file:
    file.writelines(text + b"\n" for text in texts)
    file.flush()
    os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """All lines, each checked against its digest and the one before it."""
  texts = path.read_bytes().split(b"\n")
  lines, previous = [], ""
  for number, text in enumerate(texts[:-1], 1):  # the last has no end of line: empty, or cut short
    line = _verified(text, previous)
    if line is None:
      raise UserError(f"{edited(path, number)}; {RESTORE}")
    lines.append(line)
    previous = line["digest"]
  require(bool(lines), f"{path} is empty", "restore the file")
  return lines


def edited(path: pathlib.Path, number: int) -> str:
  """The sentence about a line that does not follow from those before it."""
  return f"{path}, line {number} was edited: its digest does not follow from the lines up to it"


def _verified(text: bytes, previous: str) -> dict[str, Any] | None:
  """A line whose digest follows from its content and the digest before; None if it does not."""
  try:
    line = json.loads(text)
    content = {key: value for key, value in line.items() if key != "digest"}
    return line if line["digest"] == _digest(previous, content) else None
  except (ValueError, KeyError, AttributeError, TypeError):
    return None
