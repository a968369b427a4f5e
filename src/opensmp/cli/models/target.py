"""Loads `module:factory` targets and `name=value` arguments from the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensmp.base.message_text import MOST_FAULTS, did_you_mean, shown
from opensmp.base.strict_json import JsonFault, NotJson, parse_json
from opensmp.errors import PlanError


def load_target(target: str) -> Any:
    """Imports a module, or a file, and returns an attribute: `package.module:name`, `file.py:name`.

    The name may have dots. The current directory is searched as well.
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise PlanError(
            f"{shown(target)} names no model factory. Expected: module:factory, such as "
            "keras.applications:ResNet50, my_models:build or path/to/my_models.py:build."
        )
    value: Any = _import(module_name)
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            names = [name for name in dir(value) if not name.startswith("_")]
            hint = did_you_mean(part, names) or f"there are: {_some(names)}."
            raise PlanError(
                f"{shown(module_name)} has no attribute {shown(attribute)}; {hint}"
            ) from None
        except Exception as error:  # modules may compute attributes on access
            raise PlanError(
                f"{shown(target)} failed when it was looked up: {_told(error)}"
            ) from error
    return value


def _import(name: str) -> Any:
    """Imports a module by its name, or a file by its path."""
    path = Path(name)
    if path.suffix == ".py":
        if not os.path.isfile(path):
            raise PlanError(f"There is no file {shown(name)} (in {Path.cwd()}).")
        folder, name = str(path.resolve().parent), path.stem
    else:
        folder = str(Path.cwd())
        if not all(part.isidentifier() for part in name.split(".")):
            raise PlanError(
                f"{shown(name)} is no name of a module. Expected: names with dots between them, "
                "such as package.module, or the path of a file that ends in .py."
            )
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name != name and not name.startswith(f"{error.name}."):
            raise PlanError(
                f"Module {shown(name)} needs the module {shown(error.name)}, which is not "
                "installed."
            ) from error
        raise PlanError(
            f"There is no module {shown(name)}: looked in {folder} and where Python looks. Give "
            "its full name with dots, the path of its file, or run from the directory it is in."
        ) from error
    except (Exception, SystemExit) as error:
        raise PlanError(
            f"Module {shown(name)} failed while it was imported: {_told(error)}"
        ) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:1000]}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Parses `name=value` options; a value that is not valid JSON is taken as a string."""
    arguments: dict[str, Any] = {}
    faults = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            faults.append(shown(text))
        elif name in arguments:
            faults.append(f"{shown(name)} a second time")
        else:
            try:
                arguments[name] = parse_json(value)
            except NotJson:
                arguments[name] = value
            except JsonFault as error:
                faults.append(f"{shown(text)}, whose value cannot be used ({error})")
    if faults:
        more = len(faults) - MOST_FAULTS
        listed = ", ".join(faults[:MOST_FAULTS]) + (f" and {more} more" if more > 0 else "")
        raise PlanError(f"--arg: expected name=value, such as weights=null; received {listed}.")
    return arguments
