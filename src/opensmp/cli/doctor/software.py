"""Checks of what is installed and what the environment says; imports no TensorFlow."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping

from opensmp.base import progress, versions
from opensmp.base.message_text import counted
from opensmp.base.requirements import require_installed
from opensmp.cli.doctor.finding import Finding, error, ok, warning
from opensmp.config import LAUNCHER_PREFIX, Config
from opensmp.config.sources import ENVIRONMENT_PREFIX, SERVICE_VARIABLE
from opensmp.distributed.launch import launchers
from opensmp.errors import ConfigError, LaunchError

NEWEST: Mapping[str, tuple[int, int]] = {"tensorflow": (2, 21), "keras": (3, 15)}
"""The newest releases with which opensmp has been run; the page of versions has the runs."""


def python() -> Iterator[Finding]:
    """The interpreter and the system."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        yield warning(
            "python",
            f"{text}: opensmp is tested on Linux only; `opensmp run` ends processes less surely "
            "elsewhere",
            "run it on Linux, or in a container of it",
        )
    else:
        yield ok("python", text)
    yield ok("opensmp", f"opensmp {versions.OWN}")


def installed() -> dict[str, dict[str, str]]:
    """Returns by module which distributions of it are installed, and their versions."""
    found: dict[str, dict[str, str]] = {}
    for module, names in versions.DISTRIBUTIONS.items():
        found[module] = {}
        for name in names:
            try:
                found[module][name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def packages(found: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """TensorFlow and Keras: whether they are there, once, and of a version that was tried."""
    try:
        require_installed()
    except ImportError as fault:
        text = str(fault)
        yield error("versions", text.split(". ", 1)[0], text)
    for module, distributions in found.items():
        name = versions.NAMES[module]
        listed = ", ".join(f"{each} {version}" for each, version in distributions.items())
        if len(distributions) > 1:
            keep = next(iter(distributions))
            yield warning(
                "versions",
                f"{name} is installed more than once ({listed}), in the same folder: which files "
                "are whose is not known",
                f"python -m pip uninstall -y {' '.join(distributions)} && python -m pip install "
                f'"{keep}=={distributions[keep]}"',
            )
            continue
        for version in distributions.values():
            newest = NEWEST[module]
            release = versions.release(version)
            if release is not None and release > newest:
                shown = ".".join(map(str, newest))
                yield warning(
                    "versions",
                    f"{listed} is newer than {name} {shown}, the newest that was tried",
                    "python -m pytest tests/private (in a clone) tells whether private names have "
                    f'moved; python -m pip install "{next(iter(distributions))}=={shown}.*" goes '
                    "back",
                )
            elif not versions.is_too_old(module, version):
                yield ok("versions", listed)


def configuration(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Keys of the configuration in the environment."""
    try:
        config = Config.resolve(None, environ=environ)
    except ConfigError as fault:
        yield error(
            "configuration",
            str(fault),
            f"correct or unset these variables ({ENVIRONMENT_PREFIX}<KEY>, {SERVICE_VARIABLE})",
        )
        return
    if config.given:
        shown = ", ".join(f"{key}={config.to_dict()[key]!r}" for key in sorted(config.given))
        yield ok("configuration", f"from the environment: {shown}")
    level = environ.get(progress.VARIABLE, "").strip().lower()
    if level and level not in progress.LEVELS:
        yield warning(
            "configuration",
            f"{progress.VARIABLE}={level} is no level and is ignored",
            f"export {progress.VARIABLE}=warning   # or {', '.join(progress.LEVELS)}",
        )


def launcher(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables of launchers, which a shell or an earlier run may have left."""
    try:
        launch = launchers.detect(environ)
    except LaunchError as fault:
        names = [each.rank_variable for each in launchers.LAUNCHERS]
        left = [name for name in names if name in environ]
        yield error(
            "launcher",
            str(fault),
            f"unset {' '.join(left)}" if left else "start the program with one launcher",
        )
        return
    if launch.size > 1:
        yield ok(
            "launcher",
            f"{launch.source}: rank {launch.rank} of {counted(launch.size, 'process')}; smp.init "
            "waits for the others",
        )
    else:
        yield ok("launcher", "no launcher: a program is one process")
    stale = [name for name in environ if name.startswith(LAUNCHER_PREFIX)]
    if stale and launch.size == 1:
        yield warning(
            "launcher",
            f"{', '.join(sorted(stale)[:3])} of `opensmp run` are set, but this is no rank",
            f"unset {' '.join(sorted(stale))}",
        )
