"""A small network on phantoms at 24 px: the privacy-utility study in minutes on a CPU."""

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
    data=DataConfig(source="phantoms", image_size=24, num_examples=4000),
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=1.0, min_client_size=40),
    model=ModelConfig(name="se_resnext_micro"),
    client=ClientConfig(optimizer="adam", learning_rate=0.1, batch_size=64, num_local_steps=6),
    server=ServerConfig(num_rounds=12),
    privacy=PrivacyConfig(mechanism="dp_sgd", target_epsilon=8.0, clip_norm=1.0),
    eval=EvalConfig(every=6),
  )
