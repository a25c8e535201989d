#!/usr/bin/env bash
# The privacy-utility study: runs the sweep (resumes what was stopped), keeps tables and figures here.
# Usage: experiments/privacy_utility/run.sh phantoms|tuning [FLAGS]
#        experiments/privacy_utility/run.sh br35h|sars_cov2_ct FOLDER [FLAGS]
set -euo pipefail
name=${1:?name phantoms, tuning, br35h or sars_cov2_ct}
shift
config=$name points=points flags=()
if [[ "$name" == tuning ]]; then
  config=phantoms points=tuning
elif [[ "$name" != phantoms ]]; then
  flags+=("--config.data.path=$(realpath "${1:?name the folder with the class folders}")")
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=experiments/privacy_utility
./run.sh sweep --config="$here/$config.py" --sweep="$here/$points.py" \
  --seed_axes=partition,init,sampling --workdir="runs/privacy_utility/$name" --resume \
  "${flags[@]}" "$@"
./run.sh report --workdir="runs/privacy_utility/$name"
mkdir -p "$here/$name"
for result in table.csv table.tex figures/frontier.png figures/spread.png; do
  cp "runs/privacy_utility/$name/$result" "$here/$name/"
done
