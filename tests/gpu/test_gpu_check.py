"""`scripts/gpu_check.sh` on the devices of this machine; the short form where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from processes import ROOT, environ_of_tests

SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_the_report_of_cpu_devices_says_that_no_gpu_was_used(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    done = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh")), "--quick", "--cpu", "--output", str(path)],
        env=environ_of_tests({"PYTHON": sys.executable}),
        capture_output=True,
        text=True,
        timeout=patient(300),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text, _, after = path.read_text().partition("--- the same as JSON ---\n")
    assert "NO GPU USED" in text
    assert "2 of 2 checks passed" in text
    report = json.loads(after)
    assert report["gpus used"] == 0
    assert all(check["faults"] == [] for check in report["checks"])
    assert report["checks"][0]["devices"] == ["CPU:0", "CPU:1"]
    assert report["checks"][1]["replicas"] == 2


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_more_gpus_are_all_used(gpu_check: Any, gpus: int) -> None:
    found = gpu_check.cases(gpus, quick=False)
    assert max(case.partitions for case in found) == max(2, gpus)
    assert max(case.ranks for case in found) == max(2, gpus)
    assert any(case.environ for case in found) == (gpus > 1)
    assert all(case.ranks == 1 or case.ranks % case.partitions == 0 for case in found)


def test_a_wrong_number_and_a_check_that_ends_badly_are_faults(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpu_check.Case("mlp", 1, 2)
    good = {"devices": ["CPU:0", "CPU:1"], "loss difference": 0.0, "weight difference": 1e-7}

    def check(report: dict[str, Any], code: int = 0) -> list[str]:
        program = tmp_path / "program.py"
        program.write_text(f"print('REPORT', {json.dumps(report)!r})\nraise SystemExit({code})")
        monkeypatch.setattr(gpu_check, "PROGRAM", program)
        return list(gpu_check.checked(case, "cpu", 60.0)["faults"])

    assert check(good) == []
    assert check({**good, "weight difference": 0.1}) == ["weight difference 1.0e-01 is over 1e-05"]
    assert check({**good, "loss difference": float("nan")}) == ["loss difference nan is over 1e-05"]
    assert check({**good, "devices": ["CPU:0"]}) == ["variables are on ['CPU:0']"]
    assert check(good, 3) == ["exit code 3"]


@pytest.mark.skipif(
    not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "",
    reason="there is no NVIDIA GPU",
)
def test_all_checks_pass_on_the_gpus_of_this_machine(gpu_check: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    assert gpu_check.main(["--output", str(path)]) == 0, path.read_text()
