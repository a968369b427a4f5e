#!/usr/bin/env bash
# Builds wheel and sdist and checks them as a user meets them: their metadata, and an environment
# with nothing else in it, where the command works, the import says which TensorFlow to install, and
# mypy sees the types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || {
  cat "$folder/build.log" >&2
  exit 1
}
"$python" -m twine check --strict "$folder"/dist/*

"$python" -m venv "$folder/empty"
"$folder/empty/bin/python" -m pip install --quiet "$folder"/dist/*.whl
# From another folder: mypy must find the installed package, not the sources.
tools="$PWD/$python"
types="$PWD/scripts/types_from_outside.py"
cd "$folder"
cp "$types" user.py
"$tools" -m mypy --strict --config-file= --python-executable empty/bin/python user.py
empty/bin/opensmp --version
empty/bin/opensmp run --help >/dev/null
empty/bin/opensmp example digits | "$tools" -c "import ast, sys; ast.parse(sys.stdin.read())"
if empty/bin/python -c "import opensmp; opensmp.init" 2>import.log; then
  echo "without TensorFlow, opensmp.init must be an ImportError" >&2
  exit 1
fi
grep -q "pip install" import.log || {
  cat import.log >&2
  exit 1
}

echo "package: wheel and sdist are sound"
