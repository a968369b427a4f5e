from __future__ import annotations

import json
import sys

import pytest
from base.test_requirements import HIDE
from helpers import run_python

from opensmp.cli.doctor import doctor
from opensmp.cli.doctor.finding import error, ok, warning

COMMAND = "import sys; sys.argv = ['opensmp', 'doctor', {}]; from opensmp.cli import main; main()"


def test_this_machine_can_run_it_and_every_topic_is_looked_at():
    done = run_python(COMMAND.format("'--json'"))
    assert done.returncode == 0, done.stdout
    read = json.loads(done.stdout)
    assert read["level"] in ("ok", "warning")
    topics = {each["topic"] for each in read["findings"]}
    assert topics >= {
        *("python", "opensmp", "versions", "tensorflow", "devices", "nccl", "threads", "memory"),
        *("shared memory", "ports", "files", "clock", "launcher"),
    }
    for each in read["findings"]:
        assert bool(each["mend"]) == (each["level"] != "ok"), each


def test_without_tensorflow_it_says_what_to_install_instead_of_a_traceback():
    quick = "from opensmp.cli.doctor import stack; stack.look = lambda: ([], 3, 'no module');"
    before = "import sys; sys.argv = ['opensmp']\n" + HIDE.format(name="tensorflow") + quick
    done = run_python(before + COMMAND.format("'--json'"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = [each for each in json.loads(done.stdout)["findings"] if each["level"] == "error"]
    assert any("opensmp needs TensorFlow" in each["text"] for each in found)
    assert any("pip install" in each["mend"] for each in found)


def test_lines_have_a_sign_a_topic_and_what_mends_it():
    found = [ok("python", "3.12"), warning("threads", "few\nvery few", "do this"), ok("a", "b")]
    lines = doctor.text(found)
    assert lines == [
        "ok       python   3.12",
        "warning  threads  few",
        "                  very few",
        "                  mend: do this",
        "ok       a        b",
        "",
        "opensmp can run here; 1 warning",
    ]
    assert doctor.text([*found, error("x", "y", "z")])[-1].startswith("1 error: opensmp cannot")
    assert doctor.text([])[-1] == "all is well"


@pytest.mark.parametrize(
    ("found", "code", "level"),
    [
        ([ok("a", "b")], 0, "ok"),
        ([ok("a", "b"), warning("a", "b", "c")], 0, "warning"),
        ([error("a", "b", "c"), warning("a", "b", "c")], 1, "error"),
    ],
)
def test_the_exit_code_says_whether_it_can_run(monkeypatch, capsys, found, code, level):
    from opensmp import cli

    monkeypatch.setattr(doctor, "examine", lambda: found)
    monkeypatch.setattr(sys, "argv", ["opensmp", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
    assert json.loads(capsys.readouterr().out)["level"] == level
