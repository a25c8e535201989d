#!/usr/bin/env bash
# Wearables of the healthcare paper: exercises of ten people; about MINUTES minutes on one core.
# Needs manifest.csv and series/ of the watch data in data/smartwatch-physio. Keeps finished points;
# writes CSVs beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# study NAME ARGUMENT ...: one sweep of the preset, and its table.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/../../configs/smartwatch.py" "$@" \
    --workdir="runs/healthcare/$name" --resume
  cp "runs/healthcare/$name/results.csv" "$here/wearables/$name.csv"
}

# The same recordings with the right arm in train and the left in test, by person.
arms=runs/healthcare/arms_data
mkdir -p "$arms" "$here/wearables"
ln -sfn "$PWD/data/smartwatch-physio/series" "$arms/series"
"$python" - data/smartwatch-physio/manifest.csv "$arms/manifest.csv" <<'PY'
import sys

import pandas as pd

frame = pd.read_csv(sys.argv[1]).rename(columns={"patient": "site"})
frame["split"] = frame["side"].map({"right": "train", "left": "test"})
frame[["path", "label", "site", "split"]].to_csv(sys.argv[2], index=False)
PY

folds=S03+S06+S09,S01+S04+S07,S02+S05+S08+S10
study folds --grid="data.test_persons=$folds" --grid=seed=0:2
study random --config.data.test_persons= --config.data.split=paper --config.data.test_fraction=0.3 \
  --grid=data.seed=0:2
study recording --config.data.test_persons= --config.data.split=recording \
  --config.data.test_fraction=0.3 --grid=data.seed=0:2
study arms --config.data.path="$arms/manifest.csv" --config.data.test_persons= --grid=seed=0:1 \
  --config.eval.local_baselines
study private_window --grid="data.test_persons=$folds" --config.privacy.mechanism=dp_sgd \
  --config.privacy.target_epsilon=8
study private_person --grid="data.test_persons=$folds" --config.server.weighting=uniform \
  --config.client_privacy.mechanism=dp_fedavg --config.client_privacy.target_epsilon=8
