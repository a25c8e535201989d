"""Writes report.html again from the files of a run: python -m fedjax_med.report --workdir=DIR."""

import pathlib

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.experiment.report import write_report
from fedjax_med.flags import run_main

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")


def main(argv: list[str]) -> None:
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --workdir=DIR")
  require(_WORKDIR.value != "", "--workdir is empty", "give the folder of a run")
  print(write_report(pathlib.Path(_WORKDIR.value).expanduser()))


if __name__ == "__main__":
  run_main(main)
