#!/usr/bin/env bash
# Sets up, then runs the tests, two at a time: those that take a few seconds at most, in about ten
# minutes. Arguments go to pytest: `-m "not slow"` for a third of the long tests as well, today's,
# `-m "not slow or long"` for all of them (half an hour), `-m slow`
# for the sweeps (hours), `-n 0` for one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
