"""What CKKS costs: bytes, seconds and error of encrypted sums, by preset and kind of key.

Three hospitals send 75,000 whole numbers of a grid of 32 bits. Runs use public keys,
whose figures are the constants of ``fedjax_med.exchange.ckks.PRESETS``; symmetric ones are
NVFlare's. Needs the extra he.

Example: taskset -c 0 python -m benchmarks.ckks --json --out benchmarks/results/ckks-cpu.json
"""

import importlib.metadata
import statistics
from typing import Any

import numpy as np

from benchmarks import common
from fedjax_med.exchange import ckks

NUMBERS, HOSPITALS, BITS = 75_000, 3, 32


def measure(name: str, symmetric: bool, repeats: int) -> dict[str, Any]:
  """Costs of one preset with one kind of key, medians over rounds; the first round is left out."""
  preset = ckks.PRESETS[name]
  keys, gain = ckks.make_keys(preset, symmetric=symmetric), ckks.gain_of(preset, BITS)
  random, most = np.random.default_rng(0), 2 ** (BITS - 1) // HOSPITALS
  messages = [[random.integers(-most, most, NUMBERS).astype(np.int32)] for _ in range(HOSPITALS)]
  rounds = [ckks.add_encrypted(messages, keys, gain)[1] for _ in range(repeats + 1)][1:]

  def middle(field: str) -> float:
    return statistics.median(getattr(one, field) for one in rounds)

  size, count = middle("bytes") / HOSPITALS, -(-NUMBERS // preset.slots)
  sealed = (middle("encrypt") + middle("serialise")) / HOSPITALS
  million = NUMBERS / 1e6
  return {
    "bytes_per_parameter": round(size / NUMBERS, 3),
    "times_float32": round(size / NUMBERS / 4, 3),
    "ciphertext_bytes": round(size / count),
    "encrypt_s": middle("encrypt") / HOSPITALS,
    "serialise_s": middle("serialise") / HOSPITALS,
    "add_s": middle("add"),
    "decrypt_s": middle("decrypt"),
    "max_error": max(one.error for one in rounds) * gain,
    "max_error_steps": max(one.error for one in rounds),
    "deviation": middle("rms") * gain / HOSPITALS**0.5,
    "seal_s_per_million": sealed / million,
    "add_s_per_million": middle("add") / HOSPITALS / million,
    "open_s_per_million": middle("decrypt") / million,
  }


def main() -> None:
  options = common.parser(__doc__ or "").parse_args()
  result: dict[str, Any] = common.envelope("ckks")
  result["versions"]["tenseal"] = importlib.metadata.version("tenseal")
  result |= {"numbers": NUMBERS, "hospitals": HOSPITALS, "bits": BITS, "cases": {}}
  for name in ckks.PRESETS:
    for kind in ("public", "symmetric"):
      found = measure(name, kind == "symmetric", options.repeats)
      result["cases"][f"{name} {kind}"] = found
      common.say(f"{name} {kind}: {found}")
  common.finish(result, options)


if __name__ == "__main__":
  main()
