"""SE-ResNeXt-50 on Br35H brain MRI, five hospitals, Dirichlet 0.5, no privacy; needs data.path.

    python -m fedjax_med.train --config=configs/br35h.py --config.data.path=FOLDER \\
        --workdir=runs/br35h

FOLDER holds yes/ and no/, downloaded by hand. To expect on two CPU cores: 30 minutes, test AUROC
0.927, no ε (one run, seed 0: experiments/br35h/br35h/summary.json and timing.json).
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
    data=DataConfig(source="br35h", path="data/Br35H", image_size=64),
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=0.5, min_client_size=32),
    model=ModelConfig(name="se_resnext50_32x4d"),
    client=ClientConfig(
      optimizer="adam",
      learning_rate=5e-4,
      schedule="cosine",
      batch_size=16,
      num_local_epochs=1.0,
    ),
    server=ServerConfig(num_rounds=8),
    eval=EvalConfig(every=1),
  )
