from __future__ import annotations

from pathlib import Path

import pytest

from opensmp.base import versions
from opensmp.cli.doctor import software

ROOT = Path(__file__).parents[3]


def levels(findings) -> list[str]:
    return [each.level for each in findings]


def test_the_newest_versions_that_were_tried_are_those_of_the_page():
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 3.")]
    for column, module in ((1, "tensorflow"), (2, "keras")):
        newest = max(versions.release(row[column]) for row in rows)
        assert software.NEWEST[module] == newest, module


def test_what_is_installed_here_is_well():
    found = software.installed()
    assert found["tensorflow"]
    assert set(levels(software.packages(found))) == {"ok"}


def test_two_tensorflows_and_a_newer_one_are_told_with_the_line_that_mends_them():
    twice = {"tensorflow": {"tensorflow": "2.20.0", "tensorflow-cpu": "2.21.0"}, "keras": {}}
    [found] = software.packages(twice)
    assert found.level == "warning"
    assert found.mend.startswith("python -m pip uninstall -y tensorflow tensorflow-cpu && ")
    [found] = software.packages({"tensorflow": {"tensorflow-cpu": "2.99.1"}, "keras": {}})
    assert "newer than TensorFlow 2.21" in found.text
    assert '"tensorflow-cpu==2.21.*"' in found.mend


@pytest.mark.parametrize(
    ("environ", "expected", "words"),
    [
        ({}, [], ""),
        ({"OPENSMP_PARTITIONS": "12"}, ["ok"], "partitions=12"),
        ({"OPENSMP_PARTITIONS": "0"}, ["error"], "partitions"),
        ({"OPENSMP_LOG": "loud"}, ["warning"], "OPENSMP_LOG=loud"),
        ({"SM_HP_MP_PARAMETERS": "{"}, ["error"], "SM_HP_MP_PARAMETERS"),
    ],
)
def test_the_configuration_of_the_environment_is_checked(environ, expected, words):
    found = list(software.configuration(environ))
    assert levels(found) == expected
    assert words in "".join(each.text for each in found)


def test_variables_that_a_run_has_left_are_told():
    found = list(software.launcher({"OPENSMP_RUN_MARKS": "marks"}))
    assert levels(found) == ["ok", "warning"]
    assert found[-1].mend == "unset OPENSMP_RUN_MARKS"
    [broken] = software.launcher({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})
    assert broken.level == "error"
    assert "RANK" in broken.mend
