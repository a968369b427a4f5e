from __future__ import annotations

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opensmp.cli import app
from opensmp.cli.running.examples.example import EXAMPLES
from opensmp.errors import LaunchError

ROOT = Path(__file__).parents[3]


def run(*arguments: str):
    return CliRunner().invoke(app, ["example", *arguments])


def test_all_are_listed():
    lines = run().stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_program_is_printed_as_it_is(name):
    text = run(name).stdout
    assert text == (ROOT / "examples" / EXAMPLES[name].files[0]).read_text()
    ast.parse(text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_has_all_that_it_imports(name, tmp_path):
    done = run(name, "--output", str(tmp_path))
    assert done.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == set(EXAMPLES[name].files)
    own = {path.stem for path in (ROOT / "examples").glob("*.py")}
    for path in tmp_path.iterdir():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert own & names <= {Path(file).stem for file in EXAMPLES[name].files}


def test_files_that_are_there_are_not_replaced(tmp_path):
    (tmp_path / "digits_data.py").write_text("mine")
    done = run("digits", "--output", str(tmp_path))
    assert isinstance(done.exception, LaunchError)
    assert "digits_data.py" in str(done.exception)
    assert (tmp_path / "digits_data.py").read_text() == "mine"
    assert not (tmp_path / "fit_digits.py").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("digit",), "did you mean"), (("digits", "--output", "/nowhere"), "no such directory")],
)
def test_wrong_names_are_refused(arguments, text):
    error = run(*arguments).exception
    assert isinstance(error, LaunchError)
    assert text in str(error)
    assert error.exit_code == 2


def test_the_wheel_has_all_files():
    configured = (ROOT / "pyproject.toml").read_text()
    for found in EXAMPLES.values():
        for file in found.files:
            assert (
                f'"examples/{file}" = "opensmp/cli/running/examples/programs/{file}"' in configured
            )
