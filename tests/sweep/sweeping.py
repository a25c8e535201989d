"""What the tests of sweeps share: a small configuration, and a sweep as the command runs it."""

from configs.smoke import get_config
from fedjax_med.sweep import image_sets, runner, table
from fedjax_med.sweep.points import configure, plan_points

AXES = ("init", "sampling")


def base(**changes):
  config = get_config()
  config.model.name, config.server.num_rounds, config.eval.every = "linear", 3, 2
  for path, value in changes.items():
    section, _, name = path.partition("__")
    setattr(getattr(config, section), name, value)
  return config


def plan(points, config=None, numbers=None, seed_axes=AXES):
  """The runs of points, all of them or of these numbers."""
  configs = [configure(config or base(), point, seed_axes) for point in points]
  return plan_points(points, configs, range(len(points)) if numbers is None else numbers)


def output(folder):
  """Where points are written under ``folder``."""
  return runner.Output(
    folder_of=lambda key: table.folder_of(folder, *key),
    name="smoke",
    command_of=lambda _: "",
    listen=print,
  )


def sweep(folder, points, config=None, numbers=None, seed_axes=AXES, at_once=0):
  """Runs points as ``python -m fedjax_med.sweep`` does; returns the table."""
  table.begin(folder, config or base(), points, seed_axes)
  planned = plan(points, config, numbers, seed_axes)
  image_sets.bind(folder, planned)
  done = {each.key for each in planned if table.has_run(folder, *each.key)}
  runner.run_points(planned, done, output(folder), at_once)
  return table.write(folder)
