"""Clients side by side against one trainer of the same total batch, plain and private.

What federation costs an accelerator: images a second of ``--clients`` clients that train in
parallel, each with weights of its own, over those of one client whose batch is as large as theirs
together; and a private round over a plain one.

Example: python -m benchmarks.parallel_clients --json --image_size 192 --dtype bfloat16
"""

import statistics

from benchmarks import common
from benchmarks.programs import Setting, prepare


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--model", default="se_resnext50_32x4d")
  parser.add_argument("--image_size", type=int, default=192)
  parser.add_argument("--clients", type=int, default=8)
  parser.add_argument("--batch_size", type=int, default=8, help="of a client")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--steps", type=int, default=10, help="local steps a round")
  options = parser.parse_args()
  clients, size = options.clients, options.batch_size

  def setting(clients: int, size: int, private: bool = False) -> Setting:
    return Setting(
      model=options.model,
      image_size=options.image_size,
      clients=clients,
      batch_size=size,
      examples=size,
      steps=options.steps,
      private=private,
      dtype=options.dtype,
      chunk=clients,
      devices=1,
    )

  settings = {
    "unfederated": setting(1, clients * size),
    "clients": setting(clients, size),
    "private_clients": setting(clients, size, private=True),
  }
  prepared = {}
  for name, one in settings.items():
    prepared[name] = prepare(one)
    common.say(f"{name}: compiled in {prepared[name].compile_seconds:.1f} s")
  times = common.alternate(
    {name: lambda run=measured.run: run(1) for name, measured in prepared.items()},
    options.repeats,
  )
  images = clients * size * options.steps
  seconds = {name: statistics.median(values) for name, values in times.items()}
  result = common.envelope("parallel_clients") | {
    "images_per_second": {name: images / value for name, value in seconds.items()},
    "clients_over_unfederated": common.ratio(times["unfederated"], times["clients"]),
    "private_over_plain": common.ratio(times["private_clients"], times["clients"]),
    "compile_s": {name: measured.compile_seconds for name, measured in prepared.items()},
    "working_memory_mib": {
      name: measured.temporary_bytes and measured.temporary_bytes / 2**20
      for name, measured in prepared.items()
    },
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
