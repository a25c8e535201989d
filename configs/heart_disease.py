"""Logistic regression on UCI Heart Disease, 920 patients at four hospitals; needs data.path.

    python -m fedjax_med.train --config=configs/heart_disease.py --config.data.path=FOLDER \\
        --workdir=runs/heart_disease

FOLDER holds processed.cleveland.data, .hungarian.data, .switzerland.data and .va.data, downloaded
by hand. To expect on two CPU cores: a quarter of a minute, mean test AUROC of five splits 0.903, no
ε. FLamby's rows and split, --config.data.split=paper: AUROC 0.883, accuracy 0.798. There at ε 1.0
for the records of each hospital AUROC 0.865 (8 runs), with --config.privacy.mechanism=dp_sgd
--config.privacy.target_epsilon=1 --config.privacy.clip_norm=0.5 --config.client.learning_rate=4
--config.client.num_local_steps=1 --config.server.num_rounds=20 --config.server.weighting=examples
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
    data=DataConfig(source="heart_disease", path="data/heart-disease"),
    partition=PartitionConfig(scheme="site", num_clients=0),
    model=ModelConfig(name="linear"),
    # A hospital's records are one batch: the steps of a round are gradient descent on all of them.
    client=ClientConfig(optimizer="sgd", learning_rate=0.3, batch_size=256, num_local_steps=10),
    server=ServerConfig(num_rounds=30, weighting="uniform"),
    eval=EvalConfig(every=5),
  )
