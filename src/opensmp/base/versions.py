"""Versions: that of opensmp, the oldest TensorFlow and Keras, and those that are installed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

OWN = "0.1.0.dev0"
"""The version of opensmp; pyproject.toml repeats it, and a test compares both."""

OLDEST: Mapping[str, tuple[int, int]] = {"tensorflow": (2, 19), "keras": (3, 9)}
"""Maps a module to its oldest supported release.

`scripts/matrix.sh` runs its tests with these releases. pyproject.toml and the documentation repeat
them; a test compares all three.
"""

NAMES: Mapping[str, str] = {"tensorflow": "TensorFlow", "keras": "Keras"}
"""Maps a module to its name in messages."""

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
"""Maps a module to the distributions that provide it, the most common first."""


def release(version: str) -> tuple[int, int] | None:
    """Returns (major, minor) of a version; None if it does not begin with two numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def is_too_old(module: str, version: str) -> bool:
    """Returns whether a version such as `"2.18.1"` is below `OLDEST`; an unparsable one is not."""
    found = release(version)
    return found is not None and found < OLDEST[module]


def oldest(module: str) -> str:
    """Returns the oldest supported release of a module, such as `"2.19"`."""
    return ".".join(map(str, OLDEST[module]))


def installed(module: str, folder: Path) -> dict[str, str]:
    """Returns name to version of the distributions in `folder` that provide `module`.

    Nothing is imported. The result is empty if the module has no metadata there, for example
    because it was copied; metadata elsewhere describes another copy.
    """
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS[module]:
        for distribution in importlib.metadata.distributions(name=name, path=[str(folder)]):
            # An incomplete uninstallation may leave an empty metadata folder.
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
            if version:
                found[name] = version[1]
    return found


def too_old(found: Mapping[str, Mapping[str, str]]) -> str | None:
    """Returns the error message about all modules that are too old; None if there are none.

    If several distributions provide a module, the newest counts, because it is unknown which of
    them wrote the files last.
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
