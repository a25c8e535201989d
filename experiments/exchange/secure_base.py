"""Five hospitals train cnn_small on phantoms of 32 pixels for 10 rounds, without noise.

experiments/exchange/secure.sh
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
    data=DataConfig(source="phantoms", image_size=32, num_examples=2000),
    partition=PartitionConfig(scheme="auto", num_clients=5),
    model=ModelConfig(name="cnn_small"),
    client=ClientConfig(optimizer="momentum", learning_rate=0.05, batch_size=32, num_local_steps=8),
    server=ServerConfig(num_rounds=10),
    eval=EvalConfig(every=10),
  )
