#!/usr/bin/env bash
# Tables, figures and tests of the imaging paper (all but its cost model, cost.py) for one set and
# scale; goes on where it was stopped.
# Usage: experiments/imaging_paper/run.sh SET SCALE [FOLDER]
#        SET phantoms, br35h or sars_cov2_ct; SCALE smoke, cpu or gpu; FOLDER holds the class folders
set -euo pipefail
set=${1:?name phantoms, br35h or sars_cov2_ct} scale=${2:?name smoke, cpu or gpu}
flags=("--set=$set" "--scale=$scale")
if [[ "$set" != phantoms ]]; then
  flags+=("--path=$(realpath "${3:?name the folder with the class folders}")")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target="experiments/imaging_paper/${set}_$scale" runs="runs/imaging_paper/${set}_$scale"
mkdir -p "$target" runs/imaging_paper
for artefact in tables figures significance; do
  ./run.sh python -m "experiments.imaging_paper.$artefact" "${flags[@]}" | tee "$runs-$artefact.md"
done
cp "$runs"/imaging_paper.csv "$runs"/tables.{csv,md,tex} "$runs"/figures/*.png "$target/"
cp "$runs-significance.md" "$target/significance.md"
