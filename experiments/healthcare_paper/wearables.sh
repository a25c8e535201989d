#!/usr/bin/env bash
# Wearables of the healthcare paper: exercises of ten people; about fifteen minutes on one core.
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

mkdir -p "$runs"
for seed in 0 1 2 3 4; do
  for people in S03+S06+S09 S01+S04+S07 S02+S05+S08+S10; do
    run "people_${people}_$seed" --config.data.test_persons="$people" --config.seed="$seed"
  done
done
run random --config.data.test_persons= --config.data.split=paper --config.data.test_fraction=0.3
run person_private_S03+S06+S09 --config.data.test_persons=S03+S06+S09 --config.server.num_rounds=10 \
  --config.server.weighting=uniform --config.client_privacy.mechanism=dp_fedavg \
  --config.client_privacy.target_epsilon=8
"$python" "$here/wearables.py" "$runs" "$here/wearables.csv"
