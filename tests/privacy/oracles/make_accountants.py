"""Writes accountants.json: ε of other people's accountants for a table of settings.

One library a run, each in an environment of its own, since their requirements do not fit together:

  python tests/privacy/oracles/make_accountants.py opacus        # pip install opacus
  python tests/privacy/oracles/make_accountants.py jax_privacy   # pip install jax-privacy

Rates are whole multiples of 2^-23, which the device draws exactly. The numbers are for Poisson
sampling without truncation, but for jax_privacy's `truncated`.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

FILE = pathlib.Path(__file__).with_name("accountants.json")
# q, σ, steps, δ
POISSON = (
  (2**-10, 0.5, 1000, 1e-6),
  (2**-10, 1.0, 10_000, 1e-5),
  (2**-7, 0.8, 2000, 1e-5),
  (2**-6, 2.0, 10_000, 1e-6),
  (2**-4, 1.0, 1, 1e-5),
  (2**-4, 1.5, 300, 1e-4),
  (2**-3, 4.0, 1000, 1e-5),
  (2**-2, 10.0, 5000, 1e-6),
  (2**-1, 2.0, 30, 1e-4),
  (1.0, 5.0, 25, 1e-3),
  (1.0, 10.0, 1000, 1e-6),
)
# q, σ, steps, δ, n, batch_cap
TRUNCATED = (
  (2**-3, 2.0, 200, 1e-4, 256, 43),
  (2**-1, 3.0, 50, 1e-3, 64, 40),
  (2**-6, 1.0, 1000, 1e-5, 3200, 72),
)
# Of Opacus' PRV: what it is asked to keep to. The exact ε lies between its two ends.
EPSILON_ERROR = 2e-3
# Grid of jax-privacy's privacy loss distributions.
INTERVAL = 2e-5


def opacus() -> dict[str, Any]:
  """ε by Opacus' two accountants, of the removal of a record; addition costs no more."""
  accountants = importlib.import_module("opacus.accountants")

  def spent(name, q, sigma, steps, delta, **settings):
    accountant = getattr(accountants, name)()
    for _ in range(steps):
      accountant.step(noise_multiplier=sigma, sample_rate=q)
    return float(accountant.get_epsilon(delta, **settings))

  rows = []
  for q, sigma, steps, delta in POISSON:
    # Its answer at δ is an upper end, of δ - error in δ and plus the error in ε; the lower end is
    # the answer at δ + error in δ, less the error in ε.
    error = {"eps_error": EPSILON_ERROR, "delta_error": delta / 1000}
    high = spent("PRVAccountant", q, sigma, steps, delta, **error)
    shifted = delta + 2 * error["delta_error"]
    low = spent("PRVAccountant", q, sigma, steps, shifted, **error) - 2 * EPSILON_ERROR
    rdp = spent("RDPAccountant", q, sigma, steps, delta)
    row = {"q": q, "sigma": sigma, "steps": steps, "delta": delta}
    rows.append(row | {"prv_low": low, "prv_high": high, "rdp": rdp})
  return {"poisson": rows, "eps_error": EPSILON_ERROR}


def jax_privacy() -> dict[str, Any]:
  """ε by jax-privacy's training accountant, which composes dp-accounting's events."""
  accounting = importlib.import_module("jax_privacy.accounting")
  pld = accounting.PldAccountantConfig(value_discretization_interval=INTERVAL)

  def spent(config, sigma, steps, delta, n, batch_size, cap=None):
    params = accounting.DpParams(
      noise_multipliers=sigma,
      num_samples=n,
      delta=delta,
      batch_size=batch_size,
      truncated_batch_size=cap,
    )
    return float(accounting.DpsgdTrainingAccountant(config).compute_epsilon(steps, params))

  rows = []
  for q, sigma, steps, delta in POISSON:
    # Its rate is a ratio of whole numbers.
    arguments = (sigma, steps, delta, 2**20, int(q * 2**20))
    row = {"q": q, "sigma": sigma, "steps": steps, "delta": delta, "pld": spent(pld, *arguments)}
    rows.append(row | {"rdp": spent(accounting.RdpAccountantConfig(), *arguments)})
  truncated = []
  for q, sigma, steps, delta, n, cap in TRUNCATED:
    row = {"q": q, "sigma": sigma, "steps": steps, "delta": delta, "n": n, "batch_cap": cap}
    truncated.append(row | {"pld": spent(pld, sigma, steps, delta, n, int(q * n), cap)})
  return {"poisson": rows, "truncated": truncated, "interval": INTERVAL}


LIBRARIES = {
  "opacus": (opacus, ("opacus", "torch", "numpy", "scipy")),
  "jax_privacy": (jax_privacy, ("jax-privacy", "dp-accounting", "numpy", "scipy")),
}


def main() -> None:
  parser = argparse.ArgumentParser(description="Writes ε of a library's accountants.")
  parser.add_argument("library", choices=LIBRARIES)
  library = parser.parse_args().library
  compute, packages = LIBRARIES[library]
  section = {
    "command": f"python tests/privacy/oracles/{pathlib.Path(__file__).name} {library}",
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in packages},
  } | compute()
  values = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
  FILE.write_text(json.dumps(values | {library: section}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
  main()
