from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from helpers import run_python
from processes import launch
from typer.testing import CliRunner

import opensmp
from opensmp import cli
from opensmp.cli.options import command, key_option
from opensmp.cli.plan import CARRIED, REFUSED, PlanOptions, plan
from opensmp.cli.run import run
from opensmp.cli.running.run_options import RunOptions
from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.own_schedule import save
from opensmp.compiler.schedule.pipelines import build
from opensmp.config.keys import KEYS


def keys_of(function: Any, options: type) -> list[str]:
    own = {each.name for each in fields(options)}
    return [name for name in inspect.signature(function).parameters if name not in own]


def test_every_key_is_an_option_of_run():
    assert keys_of(run, RunOptions) == list(KEYS)


def test_every_key_is_an_option_of_plan():
    assert sorted(keys_of(plan, PlanOptions)) == sorted(KEYS)
    assert {*CARRIED, *REFUSED} < KEYS.keys()


@dataclass(frozen=True, kw_only=True)
class Words:
    word: Annotated[str, typer.Argument()]
    times: int = 1
    flags: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ([], {}),
        (["--microbatches", "4", "--check-finite"], {"microbatches": 4, "check_finite": True}),
        (["--no-contiguous", "--transport", "auto"], {"contiguous": False, "transport": "auto"}),
        (["--devices", "CPU:0, CPU:1"], {"devices": ["CPU:0", "CPU:1"]}),
        (["--devices", "gpu"], {"devices": "gpu"}),
        (["--plan", "a.json"], {"plan": "a.json"}),
        (["--plan", '{"net": "a.json"}'], {"plan": {"net": "a.json"}}),
        (["--plan", "{a.json"], {"plan": "{a.json"}),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_keys_that_were_given_are_flags(words, flags):
    found: list[Words] = []

    def keep(options: Words) -> None:
        found.append(options)

    app = typer.Typer()
    app.command()(command(Words, [key_option(name) for name in KEYS])(keep))
    assert CliRunner().invoke(app, ["--times", "3", *words, "hello"]).exit_code == 0
    assert found == [Words(word="hello", times=3, flags=flags)]


def test_flags_of_every_kind_reach_the_ranks():
    script = "import os; print(os.environ['OPENSMP_RUN_FLAGS'])"
    words = ["--pieces-per-partition", "2", "--transport", "collective", "--check-finite"]
    words += ["--recompute", "full", "--offload", "residuals", "--offload-folder", "/tmp"]
    result = launch(script, ["-n", "1", *words])
    assert json.loads(result.stdout) == {
        "transport": "collective",
        "pieces_per_partition": 2,
        "check_finite": True,
        "recompute": "full",
        "offload": "residuals",
        "offload_folder": "/tmp",
    }


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None  # an import of it raises an error
from opensmp.cli import main
sys.argv = {arguments!r}
main()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["run", "--help"]], ids=str)
def test_help_needs_no_tensorflow(arguments):
    result = run_python(WITHOUT_TENSORFLOW.format(arguments=["opensmp", *arguments]))
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage: opensmp" in result.stdout
    assert ("Cuts a model into partitions" in result.stdout) == (arguments[0] != "run")


@pytest.mark.parametrize("name", ["doctor", "plan", "run", "simulate"])
def test_help_shows_whole_names_at_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["opensmp", name, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    found = typer.main.get_command(cli.app).commands[name]
    names = {each for option in found.params for each in option.opts if each.startswith("-")}
    assert names
    assert [each for each in sorted(names) if each not in text] == []
    assert max(map(len, text.splitlines())) <= 80


def test_versions_are_shown_without_importing_anything():
    result = run_python(WITHOUT_TENSORFLOW.format(arguments=["opensmp", "--version"]))
    assert (result.returncode, result.stderr) == (0, "")
    first, *rest = result.stdout.splitlines()
    assert first == f"opensmp {opensmp.__version__}"
    assert rest[0].startswith("Python 3.")
    assert [line.split()[0].split("-")[0] for line in rest[1:]] == ["tensorflow", "keras"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell):
    word = {"bash": "COMP_WORDS", "zsh": "_TYPER_COMPLETE_ARGS", "fish": "_TYPER_COMPLETE_ARGS"}
    variables = {
        "_OPENSMP_COMPLETE": f"complete_{shell}",
        word[shell]: "opensmp ",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = run_python(WITHOUT_TENSORFLOW.format(arguments=["opensmp"]), variables)
    assert "plan" in result.stdout
    assert "run" in result.stdout


def test_a_plan_without_tensorflow_says_what_to_install():
    words = ["opensmp", "plan", "models:build", "--batch", "8", "--partitions", "2"]
    result = run_python(WITHOUT_TENSORFLOW.format(arguments=words))
    assert result.returncode == 1
    assert result.stderr.startswith("opensmp plan: ")
    assert "install" in result.stderr
    assert "Traceback" not in result.stderr


PLAN = ["plan", "m:f", "--batch", "8", "--partitions", "2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--microbatches", "0", "script.py"], "opensmp: Config: the configuration has"),
        (["run", "no_script.py"], "opensmp run: there is no file 'no_script.py'"),
        (["run", "--show-rank", "3", "script.py"], "opensmp: --show-rank 3: there is no such"),
        (["run", "-a", "--show-rank", "0", "script.py"], "opensmp: --show-rank 0 and --all-output"),
        (["run", "-n", "3", "--partitions", "2", "script.py"], "opensmp: "),
        (["run", "--plan", "no.json", "script.py"], "opensmp run: --plan: there is no file"),
        (
            ["run", "--pipeline", "no.json", "script.py"],
            "opensmp: Schedule: the file 'no.json' of the key pipeline cannot be read",
        ),
        (["run", "--no-such-option", "script.py"], "No such option"),
        ([*PLAN, "--pipeline", "zb_x"], "opensmp plan: "),
        ([*PLAN, "--no-auto-partition"], "opensmp plan: --no-auto-partition: this command is"),
        ([*PLAN, "--plan", "a.json"], "opensmp plan: --plan: this command makes plans"),
        ([*PLAN, "--devices", "CPU:0"], "which names 1 device, but partitions is 2"),
        ([*PLAN, "--microbatches", "3"], "opensmp plan: --batch 8 cannot be divided into"),
    ],
)
def test_wrong_options_and_wrong_values_end_with_2_and_one_prefix(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("script.py").touch()
    monkeypatch.setattr(sys, "argv", ["opensmp", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in text
    assert "opensmp: opensmp" not in text
    assert not re.search(r"[.?!]\.$", text.strip())


def test_a_schedule_file_for_another_number_of_partitions_is_found_before_ranks_start(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("raise SystemExit('started')")
    save(build("simple", TaskGraph.chain(2, 2)), "mine.json")
    words = ["run", "-n", "3", "--pipeline", "mine.json", "--partitions", "3", "script.py"]
    monkeypatch.setattr(sys, "argv", ["opensmp", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "'mine.json' has 2 orders, but partitions is 3" in capsys.readouterr().err
