"""Working memory of a round by clipping method, with and without remat, by the compiler's account.

Every figure is of one compiled program of two local steps at one client; nothing is timed. Prints
one JSON object with ``over_plain``, the ratio to a plain round.

Example: python -m benchmarks.memory --json
"""

import dataclasses

from benchmarks import common
from benchmarks.programs import Setting, prepare
from fedjax_med.privacy.clipping import METHODS

MIB = 2**20


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--model", default="se_resnext50_32x4d")
  parser.add_argument("--image_size", type=int, default=64)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
  parser.add_argument("--remat", action="store_true", help="measure remat of blocks as well")
  options = parser.parse_args()
  size = options.batch_size
  base = Setting(
    model=options.model,
    image_size=options.image_size,
    clients=1,
    batch_size=size,
    examples=size,
    steps=2,
    chunk=1,
    devices=1,
  )
  cases = {"plain": {}}
  cases |= {method: {"private": True, "clipping": method} for method in options.methods}
  lines = {}
  for remat in ("off", "blocks") if options.remat else ("off",):
    for name, changes in cases.items():
      if remat == "blocks" and name == "reference":
        continue  # vmap(grad) keeps a gradient of each example whatever is computed again
      measured = prepare(dataclasses.replace(base, remat=remat, **changes))
      assert measured.temporary_bytes is not None
      label = name if remat == "off" else f"{name} with remat"
      lines[label] = {
        "working_memory_mib": round(measured.temporary_bytes / MIB, 1),
        "compile_s": round(measured.compile_seconds, 2),
      }
      common.say(f"{label}: {lines[label]}")
  plain = lines["plain"]["working_memory_mib"]
  result = common.envelope("memory") | {
    "model": options.model,
    "image_size": options.image_size,
    "batch_size": size,
    "programs": lines,
    "over_plain": {
      name: round(line["working_memory_mib"] / plain, 3) for name, line in lines.items()
    },
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
