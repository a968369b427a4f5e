from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from opensmp.config import Config
from opensmp.config.keys import KEYS
from opensmp.config.kinds import ChoiceKind

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    spec = importlib.util.spec_from_file_location("keys_table", ROOT / "scripts" / "keys_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_are_the_fields_of_the_configuration():
    assert tuple(KEYS) == tuple(field.name for field in fields(Config))


def test_docstring_of_the_configuration_describes_every_key():
    assert [key for key in KEYS if f"\n        {key}: " not in str(Config.__doc__)] == []


@pytest.mark.parametrize("name", KEYS)
def test_help_is_a_sentence_that_names_every_choice(name):
    key = KEYS[name]
    assert key.help[0].isupper()
    assert key.help.endswith(".")
    assert "`" not in key.help
    choices = key.kind.choices if isinstance(key.kind, ChoiceKind) else ()
    assert [choice for choice in choices if choice not in key.help] == []


def test_table_of_the_page_is_up_to_date(keys_table):
    """`python scripts/keys_table.py` makes it."""
    assert f"\n{keys_table.table()}\n<!-- end -->" in keys_table.PAGE.read_text(encoding="utf-8")
