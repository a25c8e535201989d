"""Cox regression on 227 patients with lung cancer at ten institutions; needs data.path.

    python -m fedjax_med.train --config=configs/lung.py --config.data.path=lung.csv \\
        --workdir=runs/lung

lung.csv lies in the wheel of lifelines (pip download --no-deps lifelines; lifelines/datasets).
Institutions of under 13 patients are one, 'other'. To expect on two CPU cores: half a minute,
C-index 0.64 (mean of ten splits), no ε. --config.data.survival=hazards learns the same from losses
of single patients, which --config.privacy.mechanism=dp_sgd then protects
(experiments/healthcare_paper).
"""

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  EvalConfig,
  ModelConfig,
  PartitionConfig,
  ServerConfig,
)


def get_config() -> Config:
  return Config(
    data=DataConfig(source="lung", path="data/lung.csv"),
    partition=PartitionConfig(scheme="site", num_clients=0),
    model=ModelConfig(name="linear"),
    # An institution's patients are one batch: its partial likelihood is over all of them.
    client=ClientConfig(optimizer="sgd", learning_rate=0.3, batch_size=256, num_local_steps=5),
    server=ServerConfig(num_rounds=30),
    eval=EvalConfig(every=5),
  )
