"""One trained CNN, for the tests of what can be done with a run that has ended."""

import pathlib

import numpy as np
from PIL import Image

from configs.smoke import get_config
from fedjax_med.core.config import Config
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import build
from fedjax_med.run import summaries, writer
from fedjax_med.run.single import train_rounds


def learning_config() -> Config:
  """A small CNN on 24-pixel phantoms, not private, that keeps an average of its weights."""
  config = get_config()
  config.data.image_size, config.data.num_examples = 24, 500
  config.model.name = "cnn_small"
  config.client.optimizer, config.client.learning_rate = "momentum", 0.1
  config.client.batch_size, config.client.num_local_steps = 32, 20
  config.server.num_rounds, config.server.ema_decay = 4, 0.3
  config.privacy.mechanism = "none"
  config.eval.every = 4
  config.execution.devices, config.execution.layout = 1, "scan"
  config.execution.probe = "off"
  return config


def learn(folder: pathlib.Path, config: Config) -> None:
  """Trains and writes what ``run`` writes, but for the figures, which take longer."""
  experiment = build(config, load_hospitals(config))
  files.prepare(folder)
  outcome = train_rounds(experiment, folder, command="test")
  summary = summaries.summary_record(experiment, outcome, "learned")
  writer.finish(folder, summary, {**outcome.seconds, "total": 0.0})


def write_test_images(folder: pathlib.Path, config: Config) -> np.ndarray:
  """Writes the test images of a run as 0000.png and so on; returns their labels."""
  hospitals = load_hospitals(config)
  folder.mkdir(parents=True, exist_ok=True)
  rows = hospitals.split.test
  for number, row in enumerate(rows):
    Image.fromarray(hospitals.dataset.inputs[row, :, :, 0]).save(folder / f"{number:04}.png")
  return hospitals.dataset.labels[rows]
