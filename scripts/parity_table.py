"""Runs the parity suite and writes its table into docs/parity.md.

python scripts/parity_table.py            # runs every case with all of its layouts
python scripts/parity_table.py --results FILE   # from results of an earlier run
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import made_part

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path)
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        failed = 0
        if results is None:
            results = pathlib.Path(folder) / "parity.jsonl"
            command = [sys.executable, "-m", "pytest", "tests/parity/test_parity.py", "-q"]
            command += ["-k", "test_split_model", "-m", "slow or not slow"]
            environment = {**os.environ, "PARITY_RESULTS": str(results)}
            failed = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        rows = [json.loads(line) for line in results.read_text().splitlines()]
    made_part.write(PAGE, "parity_table", table(rows))
    print(f"{len(rows)} comparisons written to {PAGE.relative_to(ROOT)}")
    return failed


def table(rows: list[dict[str, object]]) -> str:
    """The results as a Markdown table, one row a case."""
    import keras
    import tensorflow as tf

    cases: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        cases.setdefault(str(row["case"]), []).append(row)
    lines = [
        f"{len(rows)} comparisons of {len(cases)} cases, {datetime.date.today().isoformat()}, "
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, "
        f"Python {platform.python_version()}, CPU.",
        "",
        "| case | partitions x microbatches, pattern of the stages | bound | found | cause |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, group in cases.items():
        layouts = ", ".join(
            f"{row['partitions']}x{row['microbatches']} {row['pattern']}" for row in group
        )
        worst = max(float(str(row["worst"])) for row in group)
        bound = str(group[0]["bound"])
        found = "equal bits" if worst == 0 else f"{worst:.1e}"
        cause = "" if bound == "equal bits" else str(group[0]["cause"])
        lines.append(f"| {name} | {layouts} | {bound} | {found} | {cause} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
