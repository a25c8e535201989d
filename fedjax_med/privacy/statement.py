"""The privacy statement of a run: privacy.json in words, for a hospital's data officer."""

import dataclasses
import functools
import math
from typing import Any

from fedjax_med.privacy.accounting import ceil_digits, epsilon, round_up
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.guarantees import UNITS
from fedjax_med.privacy.mechanism import Mechanism, PoissonGaussian
from fedjax_med.privacy.tuning import tuned_epsilon

# Mean numbers of runs that the cost of choosing the best is told for.
RUNS = (5, 20, 100)
ASSUMPTIONS = (
  "The number of hospitals, and how many records or patients each of them holds, may be known to"
  " everybody.",
  "Hospitals run this program as it is and do not look at the random numbers, but for colluders"
  " that a guarantee names.",
  "The random numbers are those of a simulation (float32 normals, threefry; whole numbers from"
  " tables where hospitals add the noise): good enough to study"
  " what privacy costs, not certified for protecting patients in a deployment.",
  "No record lies in two hospitals.",
  "Which images are one patient or near-duplicate group is taken as given.",
)


def mechanism_of(party: dict[str, Any]) -> Mechanism:
  """One release of a party of privacy.json."""
  if "colluders" in party:
    return DistributedGaussian(
      num_units=party["n"],
      colluders=party["colluders"],
      noise_multiplier=party["noise_multiplier"],
      clip_norm=party["clip_norm"],
      scale=party["scale"],
      num_parameters=party["num_parameters"],
    )
  return PoissonGaussian(
    num_units=party["n"],
    sampling_probability=party["sampling_probability"],
    batch_cap=party["batch_cap"],
    noise_multiplier=party["noise_multiplier"],
    clip_norm=party["clip_norm"],
    coefficients=tuple(party.get("coefficients", [1.0])),
    count_noise=party.get("count_noise", 0.0),
  )


def tuning_costs(guarantee: dict[str, Any]) -> list[dict[str, Any]]:
  """ε and δ that hold for every party if this run is the best of many; see ``tuned_epsilon``.

  They are the largest of the parties, and None where one of them has no bound.
  """
  costs = []
  for runs in RUNS:
    bounds = [
      _tuned(mechanism_of(party), party["steps"], party["delta"], runs)
      for party in guarantee["parties"]
    ]
    known = [bound for bound in bounds if bound is not None]
    pair: tuple[float | None, float | None] = (None, None)
    if len(known) == len(bounds):
      pair = max(epsilon for epsilon, _ in known), max(delta for _, delta in known)
    costs.append({"runs": runs, "epsilon": pair[0], "delta": pair[1]})
  return costs


# Points of a sweep share their mechanisms.
_tuned = functools.lru_cache(4096)(tuned_epsilon)


def participation_costs(guarantee: dict[str, Any]) -> tuple[float, float] | None:
  """ε of a hospital for readers who see its rounds; None where all take part in all rounds.

  The secret draw of hospitals is part of their protection. The log of a run, and its steps, reveal
  the draw: for their readers a round of a hospital costs as much as if all took part.

  Returns:
    ε of as many rounds as a hospital is drawn on average, and ε of all rounds.
  """
  if guarantee["unit"] != "client":
    return None
  (party,) = guarantee["parties"]  # the server
  if party["sampling_probability"] == 1:
    return None
  mechanism = dataclasses.replace(
    mechanism_of(party), sampling_probability=1.0, batch_cap=party["n"]
  )
  expected = math.ceil(party["steps"] * party["sampling_probability"])
  mean, every = (epsilon(mechanism, count, party["delta"]) for count in (expected, party["steps"]))
  return mean, every


def write_out(
  record: dict[str, Any],
  run_id: str,
  audit: dict[str, Any] | None = None,
  patients: str = "",
) -> str:
  """The statement in Markdown.

  Args:
    record: privacy.json.
    run_id: of the run.
    audit: result of an audit, if one was made.
    patients: sentence on how many names say whose image it is.
  """
  lines = [f"# Privacy statement of run {run_id}", ""]
  if not record["guarantees"]:
    who = (
      "All images lie in one place, whose holder sees them, and the model may reveal them"
      if record.get("pooled")
      else "The images stay at their hospital, but the model updates that leave it may reveal them"
    )
    return "\n".join(
      [
        *lines,
        f"This run has **no formal privacy guarantee**. {who}: without noise nothing bounds what"
        " can be learned about one image.",
        "",
        *(f"- {item}" for item in record.get("not_covered", ())),
      ]
    )
  for guarantee in record["guarantees"]:
    lines += _guarantee(guarantee)
  if patients:
    lines += ["## Who the patients are", "", patients, ""]
  lines += ["## What ε does not cover", ""]
  lines += [f"- {item}" for item in record["not_covered"]]
  lines += ["", "## What is assumed", ""]
  lines += [f"- {item}" for item in ASSUMPTIONS]
  lines += ["", "## Audit", "", audit_sentence(audit, record), "", "## How to check", ""]
  lines += [
    "`ledger.jsonl` in the folder of the run lists every mechanism that was executed;"
    " `python -m fedjax_med.privacy --workdir=DIR` recomputes each ε from it alone, with two"
    f" accountants, at any δ. Last line of the ledger: `{record.get('ledger', 'none')}`.",
    "",
  ]
  return "\n".join(lines)


def audit_sentence(audit: dict[str, Any] | None, record: dict[str, Any]) -> str:
  """Findings of an audit, a sentence or two for each unit; see ``write_out``."""
  if audit is None:
    return "No audit was made of this run (`python -m fedjax_med.audit` makes one)."
  audited, older = audit["audits"][0]["epsilon"], ""
  if record["epsilon_max"] > audited * (1 + 1e-6):
    older = (
      "The audit is older than the last rounds and does not cover them: run"
      " `python -m fedjax_med.audit` again. "
    )
  return older + " ".join(_found(each, audit["confidence"]) for each in audit["audits"])


def no_power(found: dict[str, Any]) -> str:
  """A sentence where the attack on one unit could not have refuted the claim, else nothing.

  Args:
    found: result of an audit for the unit.
  """
  shown = found["epsilon_lower_without_noise"]
  if not found["passed"] or shown > found["epsilon"]:
    return ""
  return (
    "This attack had no power to refute the claim: had there been no noise at all, it would have"
    f" shown no more than ε ≥ {shown:.2f}. It takes about 10 e^ε ="
    f" {10 * math.exp(min(found['epsilon'], 700)):.1e} trials: raise --trials of the audit."
  )


def _found(found: dict[str, Any], confidence: float) -> str:
  client = found["unit"] == "client"
  what = "Updates of one hospital" if client else "Planted records"
  where = "" if client else " at the hospital where most was found"
  verdict = "The bound from below stays under the claim."
  if any(party["epsilon_lower"] > party["epsilon"] for party in found["parties"]):
    verdict = "The bound from below CONTRADICTS THE CLAIM."
  elif not found["passed"]:
    failed = sum(not check["passed"] for check in found["checks"])
    verdict = (
      f"{failed} of {len(found['checks'])} checks of what is executed FAILED, which CONTRADICTS THE"
      " CLAIM."
    )
  return (
    f"{what} whose presence an attacker guesses gave ε ≥ {found['epsilon_lower']:.2f} (with"
    f" {100 * confidence:g}% confidence){where}; the claim of that audit was"
    f" ε ≤ {round_up(found['epsilon'])}. {verdict} {no_power(found)}"
  ).rstrip()


def _strength(epsilon: float, delta: float, protects: str, given: str) -> str:
  if math.isinf(epsilon):
    return "not at all (ε = ∞): a party trained without noise, and nothing bounds what is revealed."
  factor = f"10^{ceil_digits(epsilon / math.log(10), 3)}"
  if epsilon < 15:
    factor = ceil_digits(math.exp(epsilon), 3)
  weak = (
    f" δ IS LARGE: in up to one of {math.floor(1 / delta)} cases nothing at all is promised; give a"
    " smaller one (privacy.delta, client_privacy.delta)."
  )
  return (
    f"ε ≤ {round_up(epsilon)} at δ ≤ {ceil_digits(delta)}, for every party at its own δ (table)."
    f" Whatever can be computed from the {given} that this run gives out (not from its logs and"
    f" scores, see below), its probability changes by at most a factor of e^ε = {factor} if"
    f" {protects} is taken away, but for a probability of δ."
    " ε = 0 would be perfect; values up to 1 are strong, up to about 10 in common use, above that"
    f" the formal promise is weak.{weak if delta > 0.01 else ''}"
  )


def participation_sentence(guarantee: dict[str, Any]) -> str:
  """Worth of a guarantee against readers who see the draw; empty if all always take part."""
  costs = participation_costs(guarantee)
  if costs is None:
    return ""
  mean, every = map(round_up, costs)
  return (
    "this ε counts that nobody knows in which rounds a hospital was drawn. Checkpoints count every"
    " hospital's steps, summary.json all of them together, and running times hint at it. For whom"
    " reads it there, a hospital that took part in as many rounds as it is drawn on average has"
    f" ε ≤ {mean}, one that took part in all of them ε ≤ {every}, at the same δ. Give checkpoints"
    " to nobody, or claim that."
  )


def _shares(guarantee: dict[str, Any]) -> list[str]:
  """Lines on what ε of hospitals' own noise is computed from; none where the server adds it."""
  (party, *_) = guarantee["parties"]
  if "colluders" not in party:
    return []
  return [
    "",
    f"**Noise of the hospitals:** σ is that of {party['n'] - party['colluders']} of the"
    f" {party['n']} hospitals together, as up to {party['colluders']} may tell their own. Whole"
    f" numbers: {party['scale']:g} to 1, of {party['num_parameters']:,} numbers of an update;"
    f" rounding counted, a hospital moves the sum by {party['sensitivity']:.6g} at most. Rényi"
    f" divergence of order α of a release: {party['rho']:.6g} α + {party['xi']:.2g}.",
  ]


def _guarantee(guarantee: dict[str, Any]) -> list[str]:
  sampled = participation_sentence(guarantee)
  unit = UNITS[guarantee["unit"]]
  delta = max(party["delta"] for party in guarantee["parties"])
  given = "sums and models" if "colluders" in guarantee["parties"][0] else "models"
  lines = [
    f"## Unit of protection: {guarantee['unit']}",
    "",
    f"**What is protected:** {unit.protects}.",
    "",
    f"**How strongly:** {_strength(guarantee['epsilon_max'], delta, unit.protects, given)}",
    *(["", f"**For whom sees who took part:** {sampled}"] if sampled else []),
    "",
    "**Against whom:**",
    "",
    *[f"- {who};" for who in guarantee["holds_against"]],
    *[f"- **not** against {who};" for who in guarantee["not_against"]],
    "",
    "| party | n | sampling q | cap | noise σ | clip C | releases | δ | ε, rounded up |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for party in guarantee["parties"]:
    lines.append(
      f"| {party['name'].replace('|', '&#124;')} | {party['n']}"
      f" | {party['sampling_probability']:.4f}"
      f" | {party['batch_cap']} | {party['noise_multiplier']:.3f} | {party['clip_norm']:.3g}"
      f" | {party['steps']} | {ceil_digits(party['delta'])} | {round_up(party['epsilon'])} |"
    )
  lines += _shares(guarantee)
  accountant = guarantee["accountant"]
  lines += [
    "",
    f"**Mechanism:** {guarantee['mechanism']}. **Adjacency:** {unit.adjacency}. **Accountant:**"
    f" {accountant['name']} of {accountant['library']} {accountant['version']}. The ε of different"
    " parties are not added: a unit lies at one of them.",
    "",
    "**If this run was chosen as the best of many** (their number drawn from a logarithmic"
    " distribution, nothing shown of the others), what holds for every party is:",
    "",
    "| runs on average | ε | δ |",
    "|---|---|---|",
  ]
  for cost in tuning_costs(guarantee):
    if cost["epsilon"] is None:
      lines.append(f"| {cost['runs']} | no bound: δ would reach 1/n; raise the batch cap | |")
    else:
      lines.append(
        f"| {cost['runs']} | {round_up(cost['epsilon'])} | {ceil_digits(cost['delta'])} |"
      )
  return [*lines, ""]
