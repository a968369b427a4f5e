from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from opensmp.cli.doctor import stack
from opensmp.cli.doctor.finding import Finding

BUILD = {"kind": "build", "tensorflow": "2.21.0", "keras": "3.15.1", "backend": "tensorflow"}
CPU = {**BUILD, "cuda": None, "cudnn": None}
CUDA = {**BUILD, "cuda": "12.5", "cudnn": "9"}
NONE = {"kind": "devices", "gpus": [], "cpus": 1}
TWO = {
    "kind": "devices",
    "gpus": [{"name": f"GPU:{i}", "model": "H200"} for i in (0, 1)],
    "cpus": 1,
}
WORKS = {"kind": "convolution", "works": True}


def at(name: str) -> dict[str, str]:
    return {"kind": "look", "at": name}


def found(told, code=0, errors="", environ=None, flags="", tmp_path=None) -> list[Finding]:
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags : fpu {flags} sse\n")
    return list(stack.findings(told, code, errors, environ or {}, path))


def test_a_sound_build_for_cpus_has_no_fault(tmp_path):
    read = found([at("build"), CPU, NONE, at("convolution"), WORKS], tmp_path=tmp_path)
    assert {each.level for each in read} == {"ok"}
    assert [each.topic for each in read] == ["tensorflow", "devices", "nccl", "tensorflow"]


@pytest.mark.parametrize(
    ("flags", "environ", "level"),
    [
        ("avx512f", {}, "warning"),
        ("avx512f", {"TF_ENABLE_ONEDNN_OPTS": "0"}, "ok"),
        ("avx2", {}, "ok"),
    ],
)
def test_the_known_crash_is_told_where_it_may_happen(tmp_path, flags, environ, level):
    told = [CPU, NONE, at("convolution"), WORKS]
    last = found(told, flags=flags, environ=environ, tmp_path=tmp_path)[-1]
    assert last.level == level
    assert (last.mend == "export TF_ENABLE_ONEDNN_OPTS=0") == (level == "warning")


def test_a_crash_in_the_convolution_is_mended_by_leaving_onednn_out(tmp_path):
    read = found([CPU, NONE, at("convolution")], -signal.SIGSEGV, tmp_path=tmp_path)
    assert read[-1].level == "warning"
    assert "SIGSEGV" in read[-1].text
    assert read[-1].mend == "export TF_ENABLE_ONEDNN_OPTS=0"


def test_a_crash_at_the_import_and_an_import_that_fails_are_errors(tmp_path):
    [crash] = found([at("build")], -signal.SIGILL, "Illegal\n\n", tmp_path=tmp_path)
    assert (crash.level, "SIGILL" in crash.text, "Illegal" in crash.text) == ("error", True, True)
    failed = {"kind": "failed", "error": "ModuleNotFoundError: No module named 'tensorflow'"}
    [missing] = found([at("build"), failed], 3, tmp_path=tmp_path)
    assert missing.level == "error"
    assert "pip install" in missing.mend
    [late] = found([at("build")], None, tmp_path=tmp_path)
    assert "no answer within" in late.text


def test_several_gpus_are_named_with_nccl(tmp_path):
    read = found([CUDA, TWO, {"kind": "gpu", "index": 1, "works": False}], tmp_path=tmp_path)
    texts = {each.topic: each for each in read}
    assert texts["nccl"].level == "ok"
    assert any("2 GPUs: H200" in each.text for each in read)
    assert any("GPU:1 computes wrong numbers" in each.text for each in read)
    assert found([CPU, TWO], tmp_path=tmp_path)[-1].level == "warning"


def test_another_backend_is_an_error(tmp_path):
    read = found([{**CPU, "backend": "jax"}, NONE], tmp_path=tmp_path)
    assert any("backend 'jax'" in e.text and "KERAS_BACKEND" in e.mend for e in read)


def test_a_probe_that_hangs_or_talks_nonsense_is_survived(monkeypatch):
    def late(*args, **kwargs):
        raise subprocess.TimeoutExpired("probe", 1.0, output=b'{"kind": "look", "at": "build"}\n')

    monkeypatch.setattr(subprocess, "run", late)
    assert stack.look() == ([{"kind": "look", "at": "build"}], None, "")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(
            a, 0, 'noise\n[1]\n{"x": 1}\n{"kind": "k"}', ""
        ),
    )
    assert stack.look()[0] == [{"kind": "k"}]


def test_the_probe_gets_no_variables_of_a_rank(monkeypatch):
    seen = {}

    def run(command, env, **kwargs):
        seen.update(env)
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    stack.look({"OPENSMP_RUN_RANK": "1", "KERAS_BACKEND": "jax"})
    assert "OPENSMP_RUN_RANK" not in seen
    assert seen["KERAS_BACKEND"] == "jax"
