"""Checks of TensorFlow in a child process: build, devices, NCCL and known faults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensmp.base import versions
from opensmp.base.message_text import counted
from opensmp.cli.doctor import probe
from opensmp.cli.doctor.finding import Finding, error, ok, warning

_MOST_SECONDS = 300.0
_NO_ONEDNN = "export TF_ENABLE_ONEDNN_OPTS=0"
_CRASHES = (2, 21)  # docs/install.md, "A crash that is not ours"
_GPU_BUILD = 'python -m pip install "tensorflow[and-cuda]"'


def look(environ: Mapping[str, str] | None = None) -> tuple[list[dict[str, Any]], int | None, str]:
    """Runs the probe; returns what it told, its exit code (None: no answer), and its errors."""
    given = {**os.environ, **(environ or {})}
    # A rank's variables are not for its children.
    own = {name: value for name, value in given.items() if not name.startswith("OPENSMP_")}
    try:
        done = subprocess.run(
            [sys.executable, probe.__file__],
            env=own,
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
        code, text, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, errors = None, ""
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    told = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict) and "kind" in read:
            told.append(read)
    return told, code, errors


def findings(
    told: Sequence[dict[str, Any]],
    code: int | None,
    errors: str,
    environ: Mapping[str, str],
    table: Path = Path("/proc/cpuinfo"),
) -> Iterator[Finding]:
    """What the probe's words mean, and which faults are known of what it found."""
    by_kind = {each["kind"]: each for each in told}
    looked_at = [each["at"] for each in told if each["kind"] == "look"]
    last = looked_at[-1] if looked_at else "start"
    build = by_kind.get("build")
    if build is not None:
        yield from _of_build(build)
        gpus = by_kind.get("devices", {}).get("gpus", [])
        yield from _of_devices(build, gpus, [e for e in told if e["kind"] == "gpu"])
    for each in told:
        if each["kind"] == "failed":
            yield error("tensorflow", f"a look at it failed: {each['error']}", _mend(each["error"]))
    if "convolution" in by_kind:
        yield from _known_faults(build or {}, environ, table)
    if code is None:
        yield error(
            "tensorflow",
            f"no answer within {_MOST_SECONDS:.0f} s, at: {last}",
            "look at the machine's load and drivers (nvidia-smi), and try again",
        )
    elif code < 0:
        name = signal.Signals(-code).name
        if last == "convolution":
            yield warning(
                "tensorflow",
                f"its oneDNN kernels crash ({name}) in the gradient of a 1x1 convolution with "
                "stride 2, an even input size and few channels",
                _NO_ONEDNN,
            )
        else:
            yield error(
                "tensorflow",
                f"it crashed ({name}), at: {last}. {_last_line(errors)}",
                "python -m pip install --force-reinstall tensorflow-cpu",
            )
    elif code and build is None and not any(each["kind"] == "failed" for each in told):
        yield error("tensorflow", f"it cannot be imported. {_last_line(errors)}", _GPU_BUILD)


def _known_faults(
    build: Mapping[str, Any], environ: Mapping[str, str], table: Path
) -> Iterator[Finding]:
    """Faults of kernels that show only with some sizes and some memory."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = table.read_text()
    release = versions.release(str(build.get("tensorflow", "")))
    uses_it = environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
    if release == _CRASHES and "avx512f" in flags.split() and uses_it and not build["cuda"]:
        yield warning(
            "tensorflow",
            "on this processor (AVX-512) its oneDNN kernels can crash in the gradient of a 1x1 "
            "convolution with stride 2, an even input size and few channels, as small ResNets "
            "have; it did not happen now",
            _NO_ONEDNN,
        )
    else:
        yield ok("tensorflow", "no known fault applies: a step of a convolution works")


def _of_build(build: Mapping[str, Any]) -> Iterator[Finding]:
    kind = f"for CUDA {build['cuda']}, cuDNN {build['cudnn']}" if build["cuda"] else "for CPUs"
    yield ok("tensorflow", f"TensorFlow {build['tensorflow']} {kind}, Keras {build['keras']}")
    if build["backend"] != "tensorflow":
        yield error(
            "tensorflow",
            f"Keras runs on the backend {build['backend']!r}",
            "export KERAS_BACKEND=tensorflow",
        )


def _of_devices(
    build: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]], used: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    has_driver = os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")
    if gpus:
        named = ", ".join(dict.fromkeys(gpu["model"] or gpu["name"] for gpu in gpus))
        yield ok("devices", f"{counted(len(gpus), 'GPU')}: {named}; a partition gets one each")
    elif has_driver and not build["cuda"]:
        yield warning(
            "devices", "there is an NVIDIA GPU, but this TensorFlow is built for CPUs", _GPU_BUILD
        )
    elif has_driver:
        yield warning(
            "devices",
            "there is an NVIDIA GPU, but TensorFlow sees none: its CUDA libraries are missing, or "
            "CUDA_VISIBLE_DEVICES hides it",
            f"unset CUDA_VISIBLE_DEVICES; {_GPU_BUILD}",
        )
    else:
        yield ok("devices", "no GPU: partitions get logical CPU devices")
    for each in used:
        if not each["works"]:
            yield error(
                "devices", f"GPU:{each['index']} computes wrong numbers", "have the device tested"
            )
    if len(gpus) > 1 and build["cuda"]:
        yield ok("nccl", "part of this TensorFlow; opensmp sums up gradients on the host")
    elif len(gpus) > 1:
        yield warning(
            "nccl", "not part of this TensorFlow, though there are several GPUs", _GPU_BUILD
        )
    else:
        yield ok("nccl", "not needed with fewer than two GPUs")


def _mend(text: str) -> str:
    if "No module named" in text or "ImportError" in text:
        return 'python -m pip install "tensorflow-cpu"   # or "tensorflow[and-cuda]" for GPUs'
    return "python -m pip install --force-reinstall tensorflow-cpu"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
