from __future__ import annotations

import json
import logging

import pytest

from opensmp.config import Config
from opensmp.config.foreign_keys import FOREIGN_KEYS
from opensmp.config.keys import KEYS
from opensmp.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, foreign in FOREIGN_KEYS.items() for value in foreign.neutral],
)
def test_a_value_that_changes_nothing_is_accepted_from_everywhere(name, value, caplog):
    caplog.set_level(logging.INFO, "opensmp")
    plain = Config.resolve({"partitions": 2})
    service = {"SM_HP_MP_PARAMETERS": json.dumps({name: str(value)})}
    for given, environ in (
        ({name: value}, {}),
        ({}, {"OPENSMP_" + name.upper(): str(value)}),
        ({}, service),
    ):
        caplog.clear()
        assert Config.resolve({"partitions": 2, **given}, environ=environ) == plain
        (record,) = caplog.records
        assert name in record.getMessage()
        assert "changes nothing here" in record.getMessage()


def test_other_values_are_refused_by_name_all_at_once():
    wrong = dict.fromkeys(FOREIGN_KEYS, "anything else")
    with pytest.raises(ConfigError) as caught:
        Config.resolve({**wrong, "partitions": 0})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(FOREIGN_KEYS) + 1
    for name, foreign in FOREIGN_KEYS.items():
        (line,) = [line for line in lines if f" {name} (" in line]
        assert foreign.instead in line
        assert repr(foreign.neutral[0]) in line


@pytest.mark.parametrize("value", [True, 2, 1.5, None, [1], {"a": 1}, object()])
def test_one_is_not_true(value):
    with pytest.raises(ConfigError, match="tensor_parallel_degree"):
        Config.resolve({"tensor_parallel_degree": value})


def test_no_key_is_both():
    assert not FOREIGN_KEYS.keys() & KEYS.keys()
