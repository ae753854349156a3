#!/usr/bin/env bash
# Run the tests that do not need EasyEdit against older versions of transformers, each in its own environment under build/.
# Usage: tests/matrix.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
for version in "${@:-4.46.3 4.57.6 5.0.0}"; do
  for one in $version; do
    env="build/matrix-$one"
    [ -x "$env/bin/python" ] || python3 -m venv "$env"
    "$env/bin/python" -m pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}"
    "$env/bin/python" -m pip install -q --disable-pip-version-check -e ".[test]" "transformers==$one"
    echo "== transformers $one"
    "$env/bin/python" -m pytest -q tests/test_loading.py tests/test_adapter.py tests/test_states.py tests/test_sampler.py tests/test_rome.py
  done
done
