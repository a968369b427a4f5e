"""The API reference has all public names, and each has a docstring."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opensmp as smp

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "api_reference.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("api_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented_objects() -> Iterator[tuple[str, Any]]:
    """All public names, and the public members of classes that the package itself defines."""
    for name in smp.__all__:
        value = getattr(smp, name)
        yield name, value
        if not inspect.isclass(value):
            continue
        for kind in value.__mro__:
            if not kind.__module__.startswith("opensmp"):
                continue
            for member, found in vars(kind).items():
                is_method = isinstance(found, property | classmethod | staticmethod)
                if not member.startswith("_") and (is_method or inspect.isfunction(found)):
                    yield f"{name}.{member}", found


def test_every_public_name_has_a_docstring():
    missing = [
        name
        for name, value in documented_objects()
        if not (inspect.getdoc(getattr(value, "__func__", value)) or "").strip()
    ]
    assert not missing


def test_members_are_found():
    names = {name for name, _ in documented_objects()}
    assert {"StepOutput.accumulate", "Plan.save", "DistributedModel.fit", "Tuned.save"} <= names


def test_functions_show_an_example_or_are_short():
    """What takes arguments says how it is called."""
    missing = [
        name
        for name in smp.__all__
        if inspect.isfunction(value := getattr(smp, name))
        and inspect.signature(value).parameters
        and "Example:" not in (value.__doc__ or "")
    ]
    assert not missing


def test_the_page_is_up_to_date():
    script = load_script()
    assert script.PAGE.read_text(encoding="utf-8") == script.text()


def test_the_page_has_all_names():
    text = load_script().text()
    assert [
        name
        for name in smp.__all__
        if f"smp.{name}\n" not in text + "\n" and f"`smp.{name}`" not in text
    ] == []
