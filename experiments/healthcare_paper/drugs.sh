#!/usr/bin/env bash
# Drug response of the healthcare paper: cell lines at eleven hospitals; minutes on one core.
# Needs the four files in data/gdsc-ccle. Keeps finished points; writes CSVs beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
folder=${GDSC:-data/gdsc-ccle}

# study NAME ARGUMENT ...: one sweep of the preset, and its table.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/../../configs/gdsc.py" --config.data.path="$folder" \
    "$@" --resume --workdir="runs/healthcare/drugs_$name"
  cp "runs/healthcare/drugs_$name/results.csv" "$here/drugs/$name.csv"
}

mkdir -p "$here/drugs"
folds=data.fold=1/5,2/5,3/5,4/5,5/5
plain=(--config.server.algorithm=fedavg --config.server.personal_layers=head)
study fedavg "${plain[@]}" --grid=$folds
study own_intercept --grid=$folds
study private "${plain[@]}" --config.data.scaling=ranges \
  --config.privacy.mechanism=dp_sgd --config.privacy.target_epsilon=8 \
  --config.client.learning_rate=0.02 --grid=$folds
study alone --config.eval.local_baselines --grid=data.fold=1/5
study pairs "${plain[@]}" --config.data.split=pairs --config.data.test_fraction=0.05 \
  --config.model.name=mlp --config.client.learning_rate=0.3 --config.client.num_local_steps=16 \
  --config.server.num_rounds=100 --grid=data.seed=0:5
