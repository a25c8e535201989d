"""A small SE-ResNeXt on Br35H at 32 px, five hospitals, ε = 3 for each: minutes on a CPU.

    python -m fedjax_med.train --config=configs/br35h_small_private.py \\
        --config.data.path=FOLDER --workdir=runs/br35h_small

FOLDER holds yes/ and no/, downloaded by hand. To expect on two CPU cores: 1 minute (five seeds at
once: 34 s), test AUROC 0.811 ± 0.011 over these seeds, ε 3.0 (arm "plain" of
experiments/private_training/results.json).
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
    data=DataConfig(source="br35h", path="data/Br35H", image_size=32),
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=0.5, min_client_size=32),
    model=ModelConfig(name="se_resnext_tiny"),
    client=ClientConfig(optimizer="momentum", learning_rate=0.5, batch_size=64, num_local_steps=4),
    server=ServerConfig(num_rounds=16),
    privacy=PrivacyConfig(mechanism="dp_sgd", target_epsilon=3.0, clip_norm=1.0),
    eval=EvalConfig(every=4),
  )
