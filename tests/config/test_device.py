from __future__ import annotations

import pytest

from opensmp.config import Config
from opensmp.config.device import DEVICES, has_speed
from opensmp.errors import ConfigError


def test_a_device_has_a_name_or_numbers():
    assert Config.resolve({"device": "H100"}).device == "h100"
    given = {"memory": "16GiB", "flops": 10**13, "bandwidth": "900GB/s"}
    config = Config.resolve({"device": given})
    assert config.to_dict()["device"] == {"memory": 2**34, "flops": 1e13, "bandwidth": 9e11}
    assert Config.resolve(config.to_dict()) == config
    assert hash(config)


def test_it_may_be_json_in_the_environment():
    environ = {"OPENSMP_DEVICE": '{"memory": 12345678901}'}
    assert Config.resolve(environ=environ) == Config.resolve({"device": {"memory": 12345678901}})
    assert Config.resolve(environ={"OPENSMP_DEVICE": " a100 "}).device == "a100"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("h10", "accepted: 'v100'.*did you mean 'h100'"),
        ({}, "accepted: 'v100'"),
        ({"memori": 1}, "unknown key 'memori'; did you mean 'memory'"),
        ({"memory": "16G"}, "'memory': received '16G'.*write 16GiB"),
        ({"memory": 0}, "'memory' is 0; give a number of bytes, above 0"),
        ({"memory": True}, "'memory' is True"),
        ({"flops": "1e13"}, "'flops' is '1e13'; give a number of FLOPs per second"),
        ({"flops": float("nan")}, "'flops' is nan"),
        ({"bandwidth": 2**70}, "give a number of bytes per second"),
        (["h100"], "accepted: 'v100'"),
        (80, "accepted: 'v100'"),
    ],
)
def test_faults_say_what_is_accepted(value, message):
    with pytest.raises(ConfigError, match=message):
        Config.resolve({"device": value})


def test_speed_is_that_of_the_dtype():
    a100, v100 = DEVICES["a100"], DEVICES["v100"]
    assert a100.flops_of("bfloat16") == 312e12
    assert a100.flops_of("float32") == 156e12  # TensorFlow's default: TensorFloat-32
    assert a100.flops_of("float64") == 19.5e12
    assert v100.flops_of("float32") == v100.flops_of("bfloat16") == 15.7e12


def test_only_memory_is_no_speed():
    assert [
        has_speed(setting) for setting in (None, "t4", (("memory", 5),), (("flops", 5.0),))
    ] == [
        False,
        True,
        False,
        True,
    ]
