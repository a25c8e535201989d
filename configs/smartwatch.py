"""Shoulder exercises by a smartwatch: each person is a hospital, tested on others; needs data.path.

    python -m fedjax_med.train --config=configs/smartwatch.py --config.data.path=FILE \\
        --workdir=runs/smartwatch

FILE, manifest.csv, lists 140 recordings of ten people (path, label, patient) with six channels at
50 samples a second: the watch data of the package seglearn (Burns et al. 2018).
To expect on two CPU cores: about a minute, test AUROC 0.989, accuracy 0.897, no ε. Other folds are
--config.data.test_persons=S01+S04+S07 and S02+S05+S08+S10
(experiments/healthcare_paper/wearables.sh).
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
    data=DataConfig(
      source="series",
      path="data/smartwatch-physio/manifest.csv",
      rate=50.0,
      window_seconds=4.0,
      hop_seconds=2.0,
      ranges="-3,3;-3,3;-3,3;-8,8;-8,8;-8,8",  # g, and radians a second
      test_persons="S03+S06+S09",
    ),
    partition=PartitionConfig(scheme="site", num_clients=0),
    model=ModelConfig(name="cnn1d"),
    client=ClientConfig(
      optimizer="sgd",
      learning_rate=0.1,
      schedule="cosine",
      batch_size=32,
      num_local_steps=8,
      augmentation="jitter_scale_shift",
    ),
    server=ServerConfig(num_rounds=40),
    eval=EvalConfig(every=10),
  )
