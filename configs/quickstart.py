"""Five hospitals with unlike scanners train a small SE-ResNeXt on brain-MRI phantoms at ε ≤ 8.

    python -m fedjax_med.train --config=configs/quickstart.py --workdir=runs/quickstart

To expect on two CPU cores: 1 minute (34 to 53 s measured), test AUROC 0.97 (0.966), ε 7.98. The
noise of each run is another one, unless --noise_key names its secret.
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
    data=DataConfig(source="phantoms", image_size=32, num_examples=5000),
    partition=PartitionConfig(scheme="auto", num_clients=5),
    model=ModelConfig(name="se_resnext_tiny"),
    client=ClientConfig(optimizer="momentum", learning_rate=0.5, batch_size=128, num_local_steps=4),
    server=ServerConfig(num_rounds=16),
    privacy=PrivacyConfig(mechanism="dp_sgd", target_epsilon=8.0, clip_norm=1.0),
    eval=EvalConfig(every=2),
  )
