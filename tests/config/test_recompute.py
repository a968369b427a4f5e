from __future__ import annotations

import pytest

from opensmp.config import Config
from opensmp.errors import ConfigError

DICT = {"default": "selective", "partitions": {0: "full"}, "layers": {"b_*": "none", "a": "full"}}


def test_a_dict_is_kept_with_the_order_of_its_layers():
    config = Config.resolve({"partitions": 2, "recompute": DICT})
    assert config.to_dict()["recompute"] == {**DICT, "partitions": {"0": "full"}}
    assert Config.resolve(config.to_dict()) == config
    assert hash(config)


def test_it_may_be_json_in_the_environment():
    text = '{"partitions": {"1": "full"}}'
    config = Config.resolve({"partitions": 2}, environ={"OPENSMP_RECOMPUTE": text})
    assert config == Config.resolve({"partitions": 2, "recompute": {"partitions": {1: "full"}}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ful", "did you mean 'full'"),
        ({}, "accepted: 'none'"),
        ({"layer": {}}, "did you mean 'layers'"),
        ({"layers": {"a": "selectiv"}}, "layer 'a': did you mean 'selective'"),
        ({"layers": {"a": "auto"}}, "layer 'a' cannot be 'auto', which is for the whole model"),
        ({"partitions": {1: "most"}}, "partition 1: 'most' is not one of"),
        ({"layers": ["a"]}, "a dict with a level each"),
        ({"partitions": {-1: "full"}}, "is not the number of a partition"),
        ({"partitions": {True: "full"}}, "is not the number of a partition"),
        ({"partitions": {2: "full"}}, r"received \{'default': .*partitions from 0 to 1"),
        (None, "accepted: 'none'"),
    ],
)
def test_faults_say_what_is_accepted(value, message):
    with pytest.raises(ConfigError, match=message):
        Config.resolve({"partitions": 2, "recompute": value})
