#!/usr/bin/env bash
# Records of the healthcare paper: heart disease at four hospitals; about two minutes on two cores.
# Needs the four UCI files in data/heart-disease. Keeps finished points; writes CSVs beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# study NAME ARGUMENT ...: one sweep of the preset, and its table.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/../../configs/heart_disease.py" "$@" \
    --resume --workdir="runs/healthcare/$name"
  cp "runs/healthcare/$name/results.csv" "$here/records/$name.csv"
}

mkdir -p "$here/records"
study scaling --config.data.split=paper --grid=data.scaling=ranges,federated,hospital --grid=seed=0:5
folds=data.fold=1/5,2/5,3/5,4/5,5/5
study all --grid=$folds --grid=data.seed=0:5
study own_intercept --config.server.algorithm=fedper --config.server.personal_layers=head/bias \
  --grid=$folds --grid=data.seed=0:5
study private --config.data.split=paper --config.privacy.mechanism=dp_sgd \
  --config.privacy.target_epsilon=1 --config.privacy.clip_norm=0.5 \
  --config.client.learning_rate=4 --config.client.num_local_steps=1 --config.server.num_rounds=20 \
  --config.server.weighting=examples --grid=seed=0:8
