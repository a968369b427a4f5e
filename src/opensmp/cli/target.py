"""What the user names on the command line as `module:factory`."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensmp.errors import PlanError


def load_target(target: str) -> Any:
    """Imports a module, or runs a file as one, and takes an attribute of it.

    Args:
        target: `package.module:name` or `path/to/file.py:name`; the name may have dots.
            The current directory is searched as well.

    Raises:
        PlanError: If there is no such module or attribute, or importing it fails.

    Example:
        ```python
        load_target("keras.applications:ResNet50")
        ```
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise PlanError(
            f"'{target}' names no model factory. Expected: module:factory, such as "
            "keras.applications:ResNet50, my_models:build or path/to/my_models.py:build."
        )
    module = _import(module_name)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [name for name in dir(value) if not name.startswith("_")]
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are: {_some(names)}."
            raise PlanError(f"'{module_name}' has no attribute '{attribute}'; {hint}")
        value = getattr(value, part)
    return value


def _import(name: str) -> Any:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise PlanError(f"There is no file '{name}' (in {Path.cwd()}).")
        folder, name = str(path.resolve().parent), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise PlanError(
                f"Module '{name}' needs the module '{error.name}', which is not installed."
            ) from error
        raise PlanError(
            f"There is no module '{name}': looked in {folder} and where Python looks. Give its "
            "full name with dots, the path of its file, or run from the directory it is in."
        ) from error
    except Exception as error:
        raise PlanError(
            f"Module '{name}' failed while it was imported: {type(error).__name__}: {error}"
        ) from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `name=value`: a value is JSON if it can be read as such, else a text.

    Raises:
        PlanError: Listing those that have no name.

    Example:
        >>> parse_arguments(["weights=null", "input_shape=[64, 64, 3]", "name=small"])
        {'weights': None, 'input_shape': [64, 64, 3], 'name': 'small'}
    """
    arguments: dict[str, Any] = {}
    faults = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            faults.append(repr(text))
            continue
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    if faults:
        raise PlanError(
            f"--arg: expected name=value, such as weights=null; received {', '.join(faults)}."
        )
    return arguments
