"""Sources and modalities: one entry each, and what is known of them is read from there."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.source_facts import SOURCE_FACTS
from fedjax_med.data.hospitals import split_with_duplicates
from fedjax_med.data.modality import MODALITIES, PICTURES, modality_named, modality_of
from fedjax_med.data.sources import SOURCES, Source, load_dataset, source_named
from fedjax_med.sweep.points import image_fields


def test_every_source_that_a_configuration_may_name_is_there():
  assert {name: source.facts for name, source in SOURCES.items()} == SOURCE_FACTS


def test_an_unknown_source_or_modality_is_named_with_the_nearest():
  with pytest.raises(UserError, match=r"data.source='phantom' is unknown; did you mean 'phantoms'"):
    source_named("phantom")
  with pytest.raises(UserError, match=r"modality='picture' is unknown; did you mean 'pictures'"):
    modality_named("picture")


def test_a_new_source_is_one_entry(monkeypatch):
  made = load_dataset(DataConfig(num_examples=60, image_size=16))
  few = dataclasses.replace(made, notes=("Made up.",))
  monkeypatch.setitem(SOURCES, "mine", Source(load=lambda data: few, seeded=True))
  assert load_dataset(DataConfig(source="mine")).notes == ("Made up.",)
  assert "seed" in image_fields(DataConfig(source="mine"))
  for source in ("folder", "table", "series"):  # one set of examples, however it is split
    fields = image_fields(DataConfig(source=source))
    assert not {"split", "test_fraction", "fold", "seed"} & set(fields)
  assert {"split", "fold", "seed"} <= set(image_fields(DataConfig(source="gdsc")))


def test_a_run_of_an_older_version_is_of_pictures():
  assert modality_of({"run_id": "x"}) is PICTURES
  assert modality_of({"modality": "pictures"}) is PICTURES


def test_copies_are_those_of_the_modality(monkeypatch):
  data = DataConfig(num_examples=60, image_size=16)
  dataset = dataclasses.replace(load_dataset(data), patients=None)
  pairs = PICTURES._replace(copies=lambda inputs: np.arange(len(inputs)) // 2)
  monkeypatch.setitem(MODALITIES, "pictures", pairs)
  split = split_with_duplicates(dataset, data)
  assert (split.num_duplicate_groups, split.num_in_duplicate_groups) == (30, 60)
  assert set(split.train // 2).isdisjoint(split.test // 2)


def test_hospitals_are_read_without_jax():
  code = (
    "import sys; from fedjax_med.core.config import Config;"
    " from fedjax_med.data.hospitals import load_hospitals; config = Config();"
    " config.data.num_examples, config.data.image_size = 60, 16;"
    " load_hospitals(config); assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
