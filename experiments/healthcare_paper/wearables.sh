#!/usr/bin/env bash
# Wearables of the healthcare paper: exercises of ten people; about MINUTES minutes on one core.
# Needs manifest.csv and series/ of the watch data in data/smartwatch-physio. Keeps finished runs;
# writes a CSV beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
runs=runs/healthcare/wearables

# run NAME ARGUMENT ...: one run of the preset, unless it has ended.
run() {
  local name=$1
  shift
  [ -e "$runs/$name/summary.json" ] || "$python" -m fedjax_med.train \
    --config="$here/../../configs/smartwatch.py" --config.execution.layout=scan "$@" \
    --workdir="$runs/$name"
}

# The same recordings with the right arm in train and the left in test, by person.
mkdir -p "$runs/arms_data"
ln -sfn "$PWD/data/smartwatch-physio/series" "$runs/arms_data/series"
"$python" - data/smartwatch-physio/manifest.csv "$runs/arms_data/manifest.csv" <<'PY'
import sys

import pandas as pd

frame = pd.read_csv(sys.argv[1]).rename(columns={"patient": "site"})
frame["split"] = frame["side"].map({"right": "train", "left": "test"})
frame[["path", "label", "site", "split"]].to_csv(sys.argv[2], index=False)
PY

for people in S03+S06+S09 S01+S04+S07 S02+S05+S08+S10; do
  run "people_$people" --config.data.test_persons="$people"
  run "person_private_$people" --config.data.test_persons="$people" \
    --config.server.weighting=uniform --config.client_privacy.mechanism=dp_fedavg \
    --config.client_privacy.target_epsilon=8
done
run random --config.data.test_persons= --config.data.split=paper --config.data.test_fraction=0.3
run arms --config.data.path="$runs/arms_data/manifest.csv" --config.data.test_persons= \
  --config.eval.local_baselines
"$python" "$here/wearables.py" "$runs" "$here/wearables.csv"
