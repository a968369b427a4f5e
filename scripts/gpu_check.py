"""Runs `tests/gpu/program.py` in all ways that the devices of a machine allow; see gpu_check.sh.

The report file is text to read, and the same as JSON below a line of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "gpu" / "program.py"
BOUNDS = {"cpu": 1e-5, "gpu": 1e-4}
"""Of float32 differences after all steps, relative to the largest number: sums over the batch and
of products are added in another order. TF32 is off."""

SECONDS = 600.0
SMALL_STEPS, LARGE_STEPS = 4, 12
JSON_BEGINS = "--- the same as JSON ---"
COUNT = (
    "import tensorflow as tf, keras, json\n"
    "print('FOUND', json.dumps([len(tf.config.list_physical_devices('GPU')), tf.__version__, "
    "keras.__version__, dict(tf.sysconfig.get_build_info())], default=str))"
)


@dataclass(frozen=True)
class Case:
    """One run: a model in so many ranks and partitions.

    Attributes:
        measures: Whether its time and memory are of interest, not only its numbers.
    """

    model: str
    ranks: int
    partitions: int
    schedule: str = "interleaved"
    measures: bool = False
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        ranks = f"{self.ranks} ranks, " if self.ranks > 1 else ""
        each = ", one GPU visible to each" if self.environ else ""
        parts = f"{self.partitions} partition{'s' * (self.partitions != 1)}"
        return f"{self.model}: {ranks}{parts}, {self.schedule}{each}"


def cases(gpus: int, quick: bool) -> list[Case]:
    """The cases for a number of GPUs; 0 for CPU devices."""
    found = [Case("mlp", 1, 2)]
    if not quick:
        found += [
            Case("cnn", 1, 2, "simple"),
            Case("transformer", 1, 2, "zero_bubble"),
            Case("transformer", 2, 2),
        ]
    # Replicas normalise a batch by their own rows of it: no model with batch normalisation.
    found += [Case("mlp" if quick else "transformer", 2, 1)]
    if gpus > 2:
        found += [Case("mlp", 1, gpus), Case("mlp", gpus, gpus), Case("mlp", gpus, 1)]
    if gpus > 3 and gpus % 2 == 0:
        found += [Case("transformer", gpus, 2)]
    if gpus > 1:
        one_each = {"GPU_CHECK_ONE_EACH": "1"}
        found += [Case("mlp", 2, 2, environ=one_each), Case("mlp", 2, 1, environ=one_each)]
    if not quick:
        found += [Case("large", 1, max(2, gpus), measures=True)]
        found += [Case("large", 2, 1, measures=True), Case("large", 2, 2, measures=True)]
    return found


def run(command: Sequence[str], environ: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: over time) and output; no process is left behind."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return None, output
    return process.returncode, output


def told(output: str, word: str) -> Any:
    """What a program printed as JSON after a word at the beginning of a line; None if nothing."""
    for line in output.splitlines():
        if line.startswith(f"{word} "):
            return json.loads(line.removeprefix(word))
    return None


def checked(case: Case, kind: str, seconds: float) -> dict[str, Any]:
    steps = LARGE_STEPS if case.measures else SMALL_STEPS
    program = [str(PROGRAM), kind, case.model, str(case.partitions), case.schedule, str(steps)]
    launcher = ["-m", "opensmp", "run", "-n", str(case.ranks)] if case.ranks > 1 else []
    began = time.monotonic()
    code, output = run([sys.executable, *launcher, *program], case.environ, seconds)
    result: dict[str, Any] = {"case": case.title, "seconds of the check": time.monotonic() - began}
    found = told(output, "REPORT")
    if found is not None:
        result |= found
    faults = []
    if code != 0:
        faults.append(f"over {seconds:g} s" if code is None else f"exit code {code}")
    elif found is None:
        faults.append("no report")
    else:
        for name in ("loss difference", "weight difference"):
            if not found[name] <= BOUNDS[kind]:
                faults.append(f"{name} {found[name]:.1e} is over {BOUNDS[kind]:.0e}")
        if case.ranks == 1 and len(found["devices"]) != case.partitions:
            faults.append(f"variables are on {found['devices']}")
        if not all(device.startswith(kind.upper()) for device in found["devices"]):
            faults.append(f"variables are on {found['devices']}, not on {kind.upper()}s")
    if faults:
        result["output"] = output[-6000:]
    return {**result, "faults": faults}


def machine(quick: bool) -> dict[str, Any]:
    """What this machine and its software are."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    code, output = run([sys.executable, "-c", COUNT], {}, 120)
    counted = told(output, "FOUND")
    if counted is None:
        raise SystemExit(f"gpu_check: TensorFlow cannot be imported (exit code {code}):\n{output}")
    facts["gpus"], facts["tensorflow"], facts["keras"], facts["build"] = counted
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,compute_cap"
        facts["nvidia-smi"] = run(["nvidia-smi", query, "--format=csv"], {}, 60)[1]
        facts["topology"] = run(["nvidia-smi", "topo", "-m"], {}, 60)[1]
    if not quick:
        facts["doctor"] = run([sys.executable, "-m", "opensmp", "doctor", "--json"], {}, 180)[1]
    head = run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], {}, 20)
    facts["commit"] = head[1].strip() if head[0] == 0 else ""
    return facts


def line(result: dict[str, Any]) -> str:
    """A check in a line."""
    text = f"{'FAILED' if result['faults'] else 'passed'}  {result['case']}"
    if "loss difference" in result:
        alone = result["seconds of plain Keras"]
        text += (
            f"; differences {result['loss difference']:.1e} (loss), "
            f"{result['weight difference']:.1e} (weights); {1e3 * result['seconds']:.1f} ms a "
            f"step, plain Keras on one device {1e3 * alone:.1f} ms"
        )
        if result["overlap"] is not None:
            text += f"; overlap {100 * result['overlap']:.0f} %"
        peaks = [f"{(peak or 0) / 2**20:.0f}" for peak in result["peak bytes"]]
        text += f"; peak {', '.join(peaks)} MiB"
        if result["peak bytes of plain Keras"] is not None:
            text += f", plain {result['peak bytes of plain Keras'] / 2**20:.0f} MiB"
    return "; ".join([text, *result["faults"]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument("--cpu", action="store_true", help="CPU devices, also if there are GPUs")
    parser.add_argument("--output", type=Path, default=Path("gpu-report.txt"), help="the report")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of each check")
    options = parser.parse_args(arguments)
    facts = machine(options.quick)
    gpus = 0 if options.cpu else facts["gpus"]
    kind = "gpu" if gpus else "cpu"
    where = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "NO GPU USED: all checks on CPU devices"
    lines = [
        f"opensmp on {where}; TensorFlow {facts['tensorflow']}, Keras {facts['keras']}, Python "
        f"{facts['python']}, {facts['date']}",
        *facts.get("nvidia-smi", "").splitlines(),
    ]
    print("\n".join(lines), flush=True)
    results = []
    for case in cases(gpus, options.quick):
        results.append(checked(case, kind, options.seconds))
        lines.append(line(results[-1]))
        print(lines[-1], flush=True)
    failed = sum(bool(result["faults"]) for result in results)
    lines.append(f"{len(results) - failed} of {len(results)} checks passed, on {where}")
    print(lines[-1], flush=True)
    report = {"machine": facts, "kind": kind, "gpus used": gpus, "checks": results}
    options.output.write_text("\n".join([*lines, JSON_BEGINS, json.dumps(report, indent=1)]) + "\n")
    print(f"The report is in {options.output.resolve()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
