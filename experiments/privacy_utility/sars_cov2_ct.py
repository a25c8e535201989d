"""SARS-CoV-2-CT at 24 px with a small network: the privacy-utility study on real scans."""

from experiments.privacy_utility import phantoms
from fedjax_med.core.config import Config, DataConfig


def get_config() -> Config:
  config = phantoms.get_config()
  config.data = DataConfig(source="sars_cov2_ct", path="data/SARS-CoV-2-CT", image_size=24)
  config.partition.min_client_size = 32
  return config
