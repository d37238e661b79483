#!/usr/bin/env bash
# Instruction tuning from nothing, in under five minutes on two cores: the quickstart's model, unless it is there;
# adapters on docstring tasks; how held-out items compare before and after; the merged model.
#
#   scripts/sft_lora.sh [path.to.field=value ...]     of configs/sft_lora.yaml, e.g. lora.r=4 data.mixture.ratio=0.3
#
# The second time nothing is installed, and training goes on where it stopped. PYTHON names the interpreter to use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/environment.sh"

make_environment "$root/.venv" "$root/scripts/requirements/base.txt"
jaxlm=$root/.venv/bin/jaxlm

run=runs/sft_lora
for argument in "$@"; do
  case $argument in run.dir=*) run=${argument#run.dir=} ;; esac
done
[ -e runs/quickstart/hf/config.json ] || "$jaxlm" train "$root/configs/quickstart.yaml"
"$jaxlm" train "$root/configs/sft_lora.yaml" "$@"
"$jaxlm" export "$run" "$run/merged"
echo
echo "report    $run/report.html"
echo "adapters  $run/hf         as PEFT reads them, on runs/quickstart/hf"
echo "merged    $run/merged     as transformers reads it"
echo "compare   $jaxlm compare $run/evals/before $run/evals/after"
