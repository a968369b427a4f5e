from __future__ import annotations

from pathlib import Path

import pytest

from opensmp.config import Config
from opensmp.config.offload import level_of, offloads_optimizer, offloads_residuals
from opensmp.errors import ConfigError


def test_a_dict_says_it_by_partition():
    config = Config.resolve(
        {"partitions": 12, "offload": {10: "residuals", "2": "residuals", 3: "none"}}
    )
    assert config.to_dict()["offload"] == {
        "2": "residuals",
        "3": "none",
        "10": "residuals",
    }
    assert Config.resolve(config.to_dict()) == config
    assert hash(config)
    assert [level_of(config.offload, p) for p in (2, 3, 4)] == ["residuals", "none", "none"]
    assert [offloads_residuals(config.offload, p) for p in (2, 3, 10)] == [True, False, True]


@pytest.mark.parametrize(
    ("level", "residuals", "optimizer"),
    [
        ("none", False, False),
        ("residuals", True, False),
        ("optimizer", False, True),
        ("all", True, True),
    ],
)
def test_levels_say_what_is_offloaded(level, residuals, optimizer):
    for setting, partition in ((level, 0), (((3, level),), 3)):
        assert offloads_residuals(setting, partition) == residuals
        assert offloads_optimizer(setting, partition) == optimizer
    assert not offloads_optimizer(((3, level),), 2)


def test_it_may_be_json_in_the_environment():
    environ = {"OPENSMP_OFFLOAD": '{"1": "residuals"}', "OPENSMP_OFFLOAD_FOLDER": "/scratch"}
    config = Config.resolve({"partitions": 2}, environ=environ)
    given = {"offload": {1: "residuals"}, "offload_folder": Path("/scratch")}
    assert config == Config.resolve({"partitions": 2, **given})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("residual", "did you mean 'residuals'"),
        ({}, "accepted: 'none'"),
        ({0: "most"}, "partition 0: 'most' is not one of"),
        ({0: None}, "partition 0: None is not one of"),
        ("optimiser", "did you mean 'optimizer'"),
        ({0: "al"}, "partition 0: .*'all'"),
        ({-1: "none"}, "is not the number of a partition"),
        ({True: "none"}, "is not the number of a partition"),
        ({2: "residuals"}, r"received \{'2': 'residuals'\}.*partitions from 0 to 1"),
        (["residuals"], "accepted: 'none'"),
        (None, "accepted: 'none'"),
    ],
)
def test_faults_say_what_is_accepted(value, message):
    with pytest.raises(ConfigError, match=message):
        Config.resolve({"partitions": 2, "offload": value})


@pytest.mark.parametrize("folder", ["", 3, True, b"x", ["a"]])
def test_a_folder_is_a_path(folder):
    with pytest.raises(ConfigError, match=r"offload_folder.*the path of a folder, or None"):
        Config.resolve({"offload_folder": folder})
