#!/usr/bin/env bash
# Sets up, then runs the main job: trains a CNN, split in two, on real handwritten digits.
# Arguments go to examples/digits.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
# The job has two partitions, and each takes a GPU where there are any: one GPU is not enough.
if [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)" = 1 ]; then
  export OPENSMP_DEVICES="${OPENSMP_DEVICES:-cpu}"
fi
exec .venv/bin/python examples/digits.py "$@"
