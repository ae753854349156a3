#!/usr/bin/env bash
# Traces of all twins on the same facts, and sweeps beside them. LIMIT facts (default 30), CASES edits a setting (default 24).
#   KNOWN=known_1000.json SMOLLM2=folder benchmarks/tracing/run.sh   also traces SmolLM2 (see ../smollm2_model.py) on 50 facts that it knows
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${OUT:-benchmarks/tracing}"
# shellcheck disable=SC2207
twins=($(python -c 'from easyedit_mdm.twins import TWINS; print(*TWINS)'))
easyedit-mdm trace --compare "${twins[@]}" --limit "${LIMIT:-30}" --out "$out/twins"
for twin in "${twins[@]}"; do
  for alg in ROME_MDM MEMIT_MDM; do
    if [ -e "hparams/$alg/$twin.yaml" ]; then
      file="$alg/$twin"
      if [ "$file" = ROME_MDM/twin-llada ]; then file=benchmarks/twin-llada-activation.yaml; fi # as the others: not through the weights
      easyedit-mdm sweep --alg "$alg" --hparams "$file" --limit "${CASES:-24}" --trace "$out/twins/trace.json" --out "$out/sweep-$alg-$twin"
    fi
  done
done
# the methods that share their layer with one of these: a shorter look
for twin in "${twins[@]}"; do
  for alg in R-ROME_MDM EMMET_MDM AlphaEdit_MDM; do
    easyedit-mdm sweep --alg "$alg" --hparams "$alg/$twin" --limit "${FEW:-12}" --layers 0,1,3,4 --windows 1 --trace "$out/twins/trace.json" --out "$out/sweep-$alg-$twin"
  done
done
if [ -n "${SMOLLM2:-}" ]; then
  easyedit-mdm trace --model "$SMOLLM2" --known "$KNOWN" --limit 50 --dtype "${DTYPE:-bfloat16}" --samples 5 --out "$out/smollm2"
fi
