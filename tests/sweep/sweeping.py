"""What the tests of sweeps share: a small configuration, and a sweep as the command runs it."""

from configs.smoke import get_config
from fedjax_med.sweep import runner, table
from fedjax_med.sweep.points import plan_points

AXES = ("init", "sampling")


def base(**changes):
  config = get_config()
  config.model.name, config.server.num_rounds, config.eval.every = "linear", 3, 2
  for path, value in changes.items():
    section, _, name = path.partition("__")
    setattr(getattr(config, section), name, value)
  return config


def sweep(folder, points, config=None, numbers=None, seed_axes=AXES, at_once=0):
  """Runs points as ``python -m fedjax_med.sweep`` does; returns the table."""
  config = config or base()
  table.begin(folder, config, points, seed_axes)
  numbers = range(len(points)) if numbers is None else numbers
  planned = plan_points(config, points, numbers, seed_axes)
  done = {each.key for each in planned if table.has_run(folder, *each.key)}
  runner.run_points(
    planned, done, lambda key: table.folder_of(folder, *key), "smoke", lambda _: "", at_once, print
  )
  for each in planned:
    if config.eval.local_baselines and not each.key.baseline:
      table.finish(table.folder_of(folder, each.key.number), each.case)
  return table.write(folder)
