"""The preset configs/gdsc.py with five folds of cell lines: data.seed, 0 to 4, is the fold.

Each line is in the test side of one fold. Folds are drawn over all lines, whatever their site.
"""

import dataclasses
import pathlib
import runpy

import numpy as np

from fedjax_med.core.source_facts import SOURCE_FACTS
from fedjax_med.data import sources
from fedjax_med.data.gdsc import load_gdsc

FOLDS = 5


def load_fold(data):
  dataset = load_gdsc(pathlib.Path(data.path).expanduser(), data)
  order = np.random.default_rng(0).permutation(len(dataset.names))
  return dataclasses.replace(dataset, in_test=order % FOLDS == data.seed)


facts = SOURCE_FACTS["gdsc"]._replace(splits=("grouped",))
sources.register("gdsc_folds", sources.Source(load=load_fold, facts=facts, seeded=True))


def get_config():
  preset = pathlib.Path(__file__).resolve().parents[2] / "configs" / "gdsc.py"
  config = runpy.run_path(str(preset))["get_config"]()
  config.data.source = "gdsc_folds"
  return config
