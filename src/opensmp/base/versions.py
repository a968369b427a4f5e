"""The oldest TensorFlow and Keras that opensmp runs on, and what of them is installed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

OLDEST: Mapping[str, tuple[int, int]] = {"tensorflow": (2, 19), "keras": (3, 9)}
"""Module to the oldest release it may be of.

`scripts/matrix.sh` runs its tests with these. pyproject.toml and the documentation name
the same; a test compares them.
"""

NAMES: Mapping[str, str] = {"tensorflow": "TensorFlow", "keras": "Keras"}
"""Module to its name in messages."""

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "tensorflow": (
        "tensorflow",
        "tensorflow-cpu",
        "tensorflow-gpu",
        "tensorflow-intel",
        "intel-tensorflow",
        "tensorflow-cpu-aws",
        "tensorflow-aarch64",
        "tensorflow-rocm",
        "tensorflow-macos",
        "tf-nightly",
        "tf-nightly-cpu",
    ),
    "keras": ("keras", "keras-nightly"),
}
"""Module to the distributions that bring it, the most common first."""


def release(version: str) -> tuple[int, int] | None:
    """The first two numbers of a version; None if it does not begin with two numbers.

    Example:
        ```python
        assert release("2.19.0rc1") == (2, 19)
        ```
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def is_too_old(module: str, version: str) -> bool:
    """Whether a version is older than what is needed; one that cannot be read is not.

    Args:
        module: `"tensorflow"` or `"keras"`.
        version: As in `tensorflow.__version__`.
    """
    found = release(version)
    return found is not None and found < OLDEST[module]


def oldest(module: str) -> str:
    """The oldest release of a module that is accepted, such as `"2.19"`."""
    return ".".join(map(str, OLDEST[module]))


def installed(module: str, folder: Path) -> dict[str, str]:
    """Name and version of the distributions that may have brought a module; nothing is imported.

    Args:
        module: `"tensorflow"` or `"keras"`.
        folder: Where the module lies. What is said of another place is about another copy.

    Returns:
        Empty if nothing is known, as of a module that was copied there without its metadata.
    """
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS[module]:
        for distribution in importlib.metadata.distributions(name=name, path=[str(folder)]):
            # Of a distribution that was half removed, an empty folder may be left.
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
            if version:
                found[name] = version[1]
    return found


def too_old(found: Mapping[str, Mapping[str, str]]) -> str | None:
    """The message about all modules that are too old; None if there is none.

    If several distributions have brought a module, the newest counts: which of them wrote the
    files last cannot be seen.

    Args:
        found: Module to its distributions and their versions.
    """
    old = {
        module: versions
        for module, versions in found.items()
        if versions and all(is_too_old(module, version) for version in versions.values())
    }
    if not old:
        return None
    needed = " and ".join(f"{NAMES[m]} {oldest(m)} or newer" for m in OLDEST)
    received = " and ".join(
        f"{name} {version}" for versions in old.values() for name, version in versions.items()
    )
    verb = "is" if sum(map(len, old.values())) == 1 else "are"
    return f"opensmp needs {needed}, but {received} {verb} installed. Run: {_pip_line(old)}"


def _pip_line(old: Mapping[str, Mapping[str, str]]) -> str:
    wanted: Sequence[str] = [
        f'"{next(iter(versions))}>={oldest(module)}"' for module, versions in old.items()
    ]
    return f"python -m pip install --upgrade {' '.join(wanted)}"
