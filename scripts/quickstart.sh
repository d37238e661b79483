#!/usr/bin/env bash
# Makes a private environment in .venv, trains a small model on the embedded corpus, and says where the report is.
#
#   scripts/quickstart.sh [path.to.field=value ...]     e.g. train.steps=100 data.path=notes.txt
#
# The second time nothing is installed, and training goes on where it stopped. PYTHON names the interpreter to use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/environment.sh"

make_environment "$root/.venv" "$root/scripts/requirements/base.txt"

run=runs/quickstart
for argument in "$@"; do
  case $argument in run.dir=*) run=${argument#run.dir=} ;; esac
done
"$root/.venv/bin/jaxlm" train "$root/configs/quickstart.yaml" "$@"
echo
echo "report   $run/report.html"
echo "talk     $root/.venv/bin/jaxlm generate $run --prompt \"The \""
