"""Br35H at 24 px with a small network: the privacy-utility study on real images, on a CPU."""

from experiments.privacy_utility import phantoms
from fedjax_med.core.config import Config, DataConfig


def get_config() -> Config:
  config = phantoms.get_config()
  config.data = DataConfig(source="br35h", path="data/Br35H", image_size=24)
  config.partition.min_client_size = 32
  return config
