#!/usr/bin/env bash
# Trains SE-ResNeXt-50 on Br35H without and with privacy; keeps results and figures beside this file.
# Usage: experiments/br35h/run.sh FOLDER_WITH_yes_AND_no      (resumes what was stopped)
set -euo pipefail
data=$(realpath "${1:?name the folder that holds yes and no}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for run in br35h br35h_private; do
  ./run.sh train --config="configs/$run.py" --config.data.path="$data" --workdir="runs/$run"
  mkdir -p "experiments/br35h/$run/figures"
  for result in summary.json metrics.jsonl privacy.json hospitals.json timing.json; do
    cp "runs/$run/$result" "experiments/br35h/$run/"
  done
  for figure in rounds hospitals confusion partition; do # not examples.png: it shows the data
    cp "runs/$run/figures/$figure.png" "experiments/br35h/$run/figures/"
  done
done
