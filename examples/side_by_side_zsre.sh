#!/usr/bin/env bash
# The same zsRE records on the autoregressive twin with EasyEdit's own ROME and with ROME_MDM, and on the masked twin with ROME_MDM.
# Usage: EASYEDIT_HOME=... examples/side_by_side_zsre.sh DATA_DIR [RECORDS] [OUT]     (DATA_DIR holds zsre_mend_eval_portability_gpt4.json)
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 records=${2:-10} out=${3:-runs/side_by_side}
run() { # name, algorithm, hyperparameters
  easyedit-mdm run "$EASYEDIT_HOME/examples/run_zsre_llama2.py" --alg "$2" --hparams_dir "hparams/$3" \
    --data_dir "$data" --ds_size "$records" --metrics_save_dir "$out/$1"
}
run twin-llama-ROME ROME ROME/twin-llama.yaml
run twin-llama-ROME_MDM ROME_MDM ROME_MDM/twin-llama.yaml
run twin-llada-ROME_MDM ROME_MDM ROME_MDM/twin-llada.yaml
python examples/summarise.py "$out"/*/*_results.json
