"""Br35H at 32 px with a small network: the privacy-utility study on real images, on a CPU."""

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
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=1.0, min_client_size=32),
    model=ModelConfig(name="se_resnext_micro"),
    client=ClientConfig(optimizer="momentum", learning_rate=0.5, batch_size=32, num_local_steps=4),
    server=ServerConfig(num_rounds=12),
    privacy=PrivacyConfig(mechanism="dp_sgd", target_epsilon=8.0, clip_norm=1.0),
    eval=EvalConfig(every=4),
  )
