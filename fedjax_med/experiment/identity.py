"""What names a run: a fingerprint of all that shapes its trajectory."""

import hashlib
from typing import Any

import numpy as np

from fedjax_med import __version__
from fedjax_med.core.config import Config, fingerprint, init_seed, to_dict
from fedjax_med.data.dataset import Hospitals
from fedjax_med.models.pretrained import load_safetensors
from fedjax_med.models.registry import code_of


def run_id_of(
  config: Config, hospitals: Hospitals, names: tuple[str, ...], table: list[np.ndarray]
) -> str:
  """Fingerprint of the trajectory: equal ids mean equal weights after equal rounds.

  To rounding; bit for bit with the same layout, package versions and machine. ``table`` says who
  holds what.
  """
  values: dict[str, Any] = to_dict(config)
  # Neither what is measured, nor the layout, nor where files lie changes the trajectory; how they
  # are read does so only by the images, labels and table below.
  for name in ("path", "cache_dir", "strict", "layout", "window", "positive"):
    del values["data"][name]
  del values["execution"], values["eval"]
  values["model"]["init_seed"] = init_seed(config)
  if config.client.synthetic == "none":
    for name in ("synthetic", "synthetic_share", "gan_steps"):
      del values["client"][name]
  # Other code is another training, and must have other noise.
  values["code"] = [__version__, code_of(config.model.name)]
  path = values["model"].pop("pretrained")  # its content counts, not its name
  if path:
    values["model"]["pretrained_sha256"] = load_safetensors(path).sha256
  levels = config.privacy, config.client_privacy
  calibrated = [p.target_epsilon > 0 and p.noise_multiplier == 0 for p in levels]
  independent = config.privacy.bands == 1  # else the noise's correlation is made for the rounds
  if config.client.schedule == "constant" and independent and not any(calibrated):
    del values["server"]["num_rounds"]  # so that 5 rounds and 5 more equal 10
  for section, is_calibrated in zip(("privacy", "client_privacy"), calibrated, strict=True):
    if not is_calibrated:
      del values[section]["target_epsilon"]  # a budget: it ends a run, it does not change it
  sha = hashlib.sha256()
  # Synthetic images follow from the rest, and the id is known before they are made.
  inputs = hospitals.dataset.inputs[: hospitals.dataset.num_real]
  for array in (inputs, hospitals.dataset.labels, *table):
    sha.update(np.ascontiguousarray(array).tobytes())
  return fingerprint({"config": values, "data": sha.hexdigest(), "names": names})
