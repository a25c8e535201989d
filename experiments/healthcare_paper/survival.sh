#!/usr/bin/env bash
# Survival of the healthcare paper: lung cancer at ten institutions, ten splits; five minutes on one core.
# Needs data/lung.csv, from the wheel of lifelines:
#   pip download --no-deps --dest wheels lifelines
#   unzip -jo wheels/lifelines-*.whl lifelines/datasets/lung.csv -d data
# Keeps finished points; writes CSVs beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# study NAME ARGUMENT ...: one sweep of the preset over ten splits, and its table.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/../../configs/lung.py" "$@" \
    --grid=data.seed=0:10 --resume --workdir="runs/healthcare/survival_$name"
  cp "runs/healthcare/survival_$name/results.csv" "$here/survival/$name.csv"
}

mkdir -p "$here/survival"
study cox --config.eval.local_baselines=True
study hazards --config.data.survival=hazards
study private --config.data.survival=hazards --config.data.intervals=4 \
  --config.privacy.mechanism=dp_sgd --config.privacy.clip_norm=1 --config.client.learning_rate=1 \
  --config.client.num_local_steps=1 --config.server.num_rounds=15 \
  --grid=privacy.target_epsilon=1,3,8
