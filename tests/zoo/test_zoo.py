from __future__ import annotations

import importlib.util

import pytest
from zoo.applications import APPLICATIONS
from zoo.backbones import BACKBONES
from zoo.entry import Entry
from zoo.models import ZOO, by_size
from zoo.rotation import ROTATION, rotating
from zoo.runner import check, passed

PARTITIONS = (2, 4)


def _check(entry: Entry, timeout: float) -> None:
    if entry.family == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras_hub is not installed; scripts/setup.sh says how")
    outcomes = list(check(entry.name, PARTITIONS, timeout))
    for outcome in outcomes:
        print(outcome)
    for partitions in PARTITIONS:
        assert passed(outcomes, partitions), "\n".join(map(str, outcomes))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("entry", rotating(ROTATION), ids=str)
def test_rotating_part_of_the_zoo_equals_plain_keras(entry: Entry) -> None:
    _check(entry, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("entry", by_size(), ids=str)
def test_every_model_of_the_zoo_equals_plain_keras(entry: Entry) -> None:
    _check(entry, timeout=3600)


def test_the_zoo_has_all_of_keras_applications() -> None:
    assert len(APPLICATIONS) == 40
    assert {"ResNet50", "NASNetLarge", "EfficientNetB7", "ConvNeXtXLarge"} <= set(APPLICATIONS)


def test_the_zoo_has_at_least_15_backbones() -> None:
    assert len(BACKBONES) >= 15
    assert len(ZOO) == len(APPLICATIONS) + len(BACKBONES)


def test_every_small_model_has_its_turn_in_the_rotation() -> None:
    seen = {entry.name for rotation in range(60) for entry in rotating(rotation)}
    assert seen == {entry.name for entry in by_size("small")}
    assert [e.name for e in rotating(7)] == [e.name for e in rotating(7)]
