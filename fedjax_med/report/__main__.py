"""Writes report.html of a run, of several runs or of a sweep again, from their files.

Examples:
  python -m fedjax_med.report --workdir=runs/first
  python -m fedjax_med.report --workdir=runs/first,runs/second --out=runs/both
  python -m fedjax_med.report --workdir=runs/noise
"""

from absl import flags

from fedjax_med.api import write_report
from fedjax_med.core.errors import require
from fedjax_med.core.presets import register_parts
from fedjax_med.core.text import visible
from fedjax_med.flags import define_network, require_company, run_main

flags.DEFINE_list("workdir", [], "Folder of a run or of a sweep, or several of runs with commas.")
flags.DEFINE_string("out", "", "Folder for the report on several runs.")
define_network()


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --workdir=DIR")
  require(bool(values.workdir), "--workdir is empty", "give the folder of a run or of a sweep")
  require_company("out", len(values.workdir) > 1, "several folders in --workdir")
  require(
    bool(values.out) or len(values.workdir) == 1,
    "--out is empty",
    "name a folder for the report on several runs",
  )
  register_parts(values.network)
  folders = values.workdir if len(values.workdir) > 1 else values.workdir[0]
  print(visible(str(write_report(folders, values.out or None))))


if __name__ == "__main__":
  run_main(main)
