"""The smallest real run: three hospitals, tiny phantoms, a tiny network, private; seconds.

    python -m fedjax_med.train --config=configs/smoke.py --workdir=runs/smoke

To expect on two CPU cores: half a minute (8 to 21 s measured, 3 to 17 of them to compile), ε 11.23.
It is no result: test AUROC 0.55 to 0.69 in three runs, of 60 images after 6 rounds of noise.
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
    data=DataConfig(source="phantoms", image_size=16, num_examples=300),
    partition=PartitionConfig(scheme="dirichlet", num_clients=3, alpha=1.0, min_client_size=20),
    model=ModelConfig(name="se_resnext_micro"),
    client=ClientConfig(optimizer="sgd", learning_rate=0.5, batch_size=16, num_local_steps=2),
    server=ServerConfig(num_rounds=6),
    privacy=PrivacyConfig(mechanism="dp_sgd", noise_multiplier=1.0),
    eval=EvalConfig(every=2),
  )
