"""What several test files need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"


def run_python(
    code: str, env: dict[str, str] | None = None, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, where TensorFlow is not initialised.

    Args:
        code: The program.
        env: Variables on top of the environment, which comes without any configuration of
            opensmp, Keras or a launcher.
        timeout: Seconds after which the program is killed and the test fails.

    Returns:
        The finished process with its `stdout` and `stderr`.
    """
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENSMP_", "SM_HP_", "OMPI_", "PMI_", "SLURM_", "KERAS_"))
        and name not in ("WORLD_SIZE", "TF_USE_LEGACY_KERAS")
        and name not in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    }
    path = [str(SOURCE), clean.get("PYTHONPATH", "")]
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    clean["TF_CPP_MIN_LOG_LEVEL"] = "3"
    clean["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | (env or {}),
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(code: str, env: dict[str, str] | None = None, timeout: float = 400) -> str:
    """What the program printed; the test fails with its traceback if it did not end well."""
    done = run_python(code, env, timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
