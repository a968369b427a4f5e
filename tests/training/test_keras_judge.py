"""A few of Keras' own tests with split models; `scripts/keras_judge.py` runs all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from turns import in_turn

ROOT = Path(__file__).parents[2]
SAMPLE = {
    "trainers/trainer_test.py": "test_nested_inputs or test_loss_weights or test_training_arg or "
    "test_constraints_are_applied or test_partial_loss or test_multiple_compiles",
    "callbacks/csv_logger_test.py": "",
}


def _load():
    spec = importlib.util.spec_from_file_location("keras_judge", ROOT / "scripts/keras_judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


judge = _load()


@pytest.mark.parametrize("name", in_turn(SAMPLE, len(SAMPLE)))
def test_what_passes_with_plain_models_passes_with_split_ones(name):
    (path,) = judge.test_files([name])
    plain, split = (judge.run(path, is_split, 150, SAMPLE[name]) for is_split in (False, True))
    assert sum(outcome.outcome == "passed" for outcome in plain.values()) >= 2
    failures = dict(judge._failures(plain, split))
    assert {test for test in failures if judge.why(test) is None} == set(), failures


def test_reasons_are_for_tests_that_exist():
    source = "".join(path.read_text() for path in judge.test_files([]))
    for part in judge.WHY:
        assert part.rpartition("::")[2] in source, part


def test_the_page_names_what_does_not_pass_and_why():
    passed, failed = judge.Outcome("passed"), judge.Outcome("failed", "AssertionError: 2 | 1")
    counted = "BackupAndRestoreCallbackTest::test_best_case_step"
    plain = {"A::one": passed, "A::two": failed, counted: passed}
    split = {"A::one": passed, "A::two": failed, counted: failed}
    page = judge.page({"callbacks/some_test.py": {"plain": plain, "split": split}})
    assert "| callbacks/some_test.py | 2 | 1 | 1 | 0 | 1 |" in page
    assert f"| `{counted}` | {judge.COUNTS_CALLS} |" in page
    assert "| callbacks/some_test.py | 1 | AssertionError: 2 \\| 1 |" in page
