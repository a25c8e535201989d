"""Writes report.html of a run, of several runs or of a sweep again, from their files.

Examples:
  python -m fedjax_med.report --workdir=runs/first
  python -m fedjax_med.report --workdir=runs/first,runs/second --out=runs/both
  python -m fedjax_med.report --workdir=runs/noise
"""

import pathlib

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.core.text import visible
from fedjax_med.flags import require_company, run_main

flags.DEFINE_list("workdir", [], "Folder of a run or of a sweep, or several of runs with commas.")
flags.DEFINE_string("out", "", "Folder for the report on several runs.")


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --workdir=DIR")
  require(bool(values.workdir), "--workdir is empty", "give the folder of a run or of a sweep")
  require_company("out", len(values.workdir) > 1, "several folders in --workdir")
  folders = [pathlib.Path(folder).expanduser() for folder in values.workdir]
  if len(folders) == 1 and not (folders[0] / "sweep.json").exists():
    from fedjax_med.report.run_page import write_report

    print(visible(str(write_report(folders[0], papers=True))))
    return
  from fedjax_med.report import sweep_page

  if len(folders) == 1:
    print(visible(str(sweep_page.write(sweep_page.read_sweep(folders[0]), folders[0]))))
    return
  require(bool(values.out), "--out is empty", "name a folder for the report on several runs")
  page = sweep_page.write(sweep_page.read_runs(folders), pathlib.Path(values.out).expanduser())
  print(visible(str(page)))


if __name__ == "__main__":
  run_main(main)
