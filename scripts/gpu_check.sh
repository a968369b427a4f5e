#!/usr/bin/env bash
# Checks opensmp on the GPUs of this machine (1, 2, 8 or any number), and writes one report file to
# send back: parity with plain Keras, overlap, memory and speed. Without a GPU it says so and runs the
# same on CPU devices. In a clone, after scripts/setup.sh (TENSORFLOW=gpu bash scripts/setup.sh).
#
#     bash scripts/gpu_check.sh [--quick] [--cpu] [--output gpu-report.txt]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
exec "${PYTHON:-.venv/bin/python}" scripts/gpu_check.py "$@"
