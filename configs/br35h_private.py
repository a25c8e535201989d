"""SE-ResNeXt-50 on Br35H as in br35h.py, with record-level DP-SGD at ε = 8 for each hospital.

    python -m fedjax_med.train --config=configs/br35h_private.py --config.data.path=FOLDER \\
        --workdir=runs/br35h_private

FOLDER holds yes/ and no/, downloaded by hand. To expect on two CPU cores: 18 minutes, test AUROC
0.918, ε 8.0 (one run, seed 0: experiments/br35h/br35h_private/summary.json and timing.json).
"""

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  EvalConfig,
  ModelConfig,
  PartitionConfig,
  PrivacyConfig,
  ServerConfig,
)


def get_config() -> Config:
  return Config(
    data=DataConfig(source="br35h", path="data/Br35H", image_size=64),
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=0.5, min_client_size=32),
    model=ModelConfig(name="se_resnext50_32x4d"),
    # A large batch: noise has 25 million directions to go in, so what counts is its share.
    client=ClientConfig(optimizer="sgd", learning_rate=0.4, batch_size=128, num_local_epochs=1.0),
    server=ServerConfig(num_rounds=4),
    privacy=PrivacyConfig(mechanism="dp_sgd", target_epsilon=8.0, clip_norm=1.0),
    eval=EvalConfig(every=1),
  )
