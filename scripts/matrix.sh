#!/usr/bin/env bash
# Runs smoke, canaries and today's part of the parity tests with the oldest and the newest
# TensorFlow, Keras and Python, each in an environment of its own, and writes the table into
# docs/versions.md. See `scripts/matrix.sh --help`.
#
#   scripts/matrix.sh            all of it: 8 GB in .matrix/, an hour or two
#   scripts/matrix.sh --quick    the oldest versions' smoke alone, as CI does
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || python="${PYTHON:-python3}"
exec "$python" scripts/matrix.py "$@"
