from __future__ import annotations

import re

import pytest
from cli.reporting.made_runs import planned, write_run
from typer.testing import CliRunner

from opensmp.cli import app
from opensmp.errors import SavingError

FIRST, SECOND = "20260101-000000-0000", "20260102-000000-0000"


def invoke(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)], catch_exceptions=False)


def test_report_is_written_into_the_folder(tmp_path):
    write_run(tmp_path, planned(2))
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert "Bubble" in result.output
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_report_can_be_made_again_and_elsewhere(tmp_path):
    write_run(tmp_path / "run", planned(2))
    other = tmp_path / "new" / "page.html"
    for _ in range(2):
        assert invoke(tmp_path / "run", "--output", other).exit_code == 0
    assert other.is_file()
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("args", "name"), [((), SECOND), (("--run", FIRST), FIRST)])
def test_the_last_run_is_taken_unless_another_is_named(args, name, tmp_path):
    for each in (FIRST, SECOND):
        write_run(tmp_path, planned(2), name=each)
    assert invoke(tmp_path, *args).exit_code == 0
    text = (tmp_path / "report.html").read_text()
    assert f"run {name}" in re.search(r"<title>(.*?)</title>", text)[1]


def test_a_run_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write_run(tmp_path, planned(2), name=FIRST)
    with pytest.raises(SavingError, match=f"no run 'x' in this folder; there are {FIRST}"):
        invoke(tmp_path, "--run", "x")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(SavingError, match=r"opensmp report: .* has no run"):
        invoke(tmp_path)


def test_a_broken_plan_is_a_note_of_the_page(tmp_path):
    write_run(tmp_path, planned(2))
    (plan,) = tmp_path.glob("*.plan0.json")
    plan.write_text("{")
    assert invoke(tmp_path).exit_code == 0
    assert "is no JSON" in (tmp_path / "report.html").read_text()


def test_a_place_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    write_run(tmp_path, planned(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(SavingError, match="--output"):
        invoke(tmp_path, "--output", tmp_path / "file" / "page.html")
