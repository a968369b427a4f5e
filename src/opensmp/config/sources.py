"""Sources of configuration values: a dict, environment variables, a training service's JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from opensmp.base import message_text, progress
from opensmp.base.strict_json import JsonFault, NotJson, parse_json

ENVIRONMENT_PREFIX = "OPENSMP_"
"""`OPENSMP_PARTITIONS=2` sets the key `partitions`; an empty value counts as unset."""

LAUNCHER_PREFIX = "OPENSMP_RUN_"
"""Prefix of variables that the launcher sets for internal use; they are not configuration keys."""

IDLE_VARIABLE = "OPENSMP_IDLE_SECONDS"
"""Seconds that a run of several processes may be idle; not a configuration key."""

TRIAL_VARIABLE = "OPENSMP_TRIAL"
"""What `opensmp tune` tells a script that it measures; not a configuration key."""

SERVICE_VARIABLE = "SM_HP_MP_PARAMETERS"
"""The variable in which training services pass all keys as one JSON object."""

_MOST_CHARACTERS = 1_000_000  # of a configuration file

ALIASES: Mapping[str, str] = {"pipeline_parallel_degree": "partitions"}
"""Maps alternative names to the canonical keys."""


class Given(NamedTuple):
    """A value as a source gave it; `text` marks a string that still has to be converted."""

    name: str  # as the source spelled it, possibly an alias
    value: Any
    source: str
    text: bool = False

    @property
    def key(self) -> str:
        """The canonical key."""
        return ALIASES.get(self.name, self.name)

    def __str__(self) -> str:
        return f"{message_text.plain(self.name)} ({self.source}): received {shown(self.value)}"


def from_explicit(given: Any, faults: list[str]) -> list[Given]:
    """Returns the values that `smp.init` was given: as a dict, or as the path of a JSON file."""
    if isinstance(given, str | os.PathLike):
        return from_file(given, faults)
    return from_dict(given, "smp.init dict", faults)


def from_file(path: str | os.PathLike[str], faults: list[str]) -> list[Given]:
    """Returns the values in a JSON file, such as `opensmp tune` writes."""
    named = shown(str(path))
    try:
        with open(path, encoding="utf-8") as file:
            values = parse_json(file.read(_MOST_CHARACTERS))
    except (OSError, ValueError) as error:  # not there, or no text
        reason = getattr(error, "strerror", None) or error
        faults.append(
            f"configuration file {named}: it cannot be read ({reason}); accepted: a file with a "
            'JSON object such as {"partitions": 2, "microbatches": 4}'
        )
        return []
    return from_dict(values, f"file {message_text.shown(str(path))}", faults)


def from_dict(values: Any, source: str, faults: list[str]) -> list[Given]:
    """Returns the values of a dict; adds a fault if `values` is not a dict."""
    if values is None:
        return []
    if not isinstance(values, Mapping):
        faults.append(
            f"{source}: received {shown(values)}; accepted: a dict such as "
            '{"partitions": 2, "microbatches": 4}'
        )
        return []
    return [Given(name, value, source) for name, value in values.items()]


def from_variables(environ: Mapping[str, str]) -> list[Given]:
    """Returns the values of the variables `OPENSMP_<KEY>`."""
    return [
        Given(
            variable[len(ENVIRONMENT_PREFIX) :].lower(),
            text,
            message_text.plain(variable),
            text=True,
        )
        for variable, text in sorted(environ.items())
        if variable.startswith(ENVIRONMENT_PREFIX)
        and not variable.startswith(LAUNCHER_PREFIX)
        and variable not in (IDLE_VARIABLE, TRIAL_VARIABLE, progress.VARIABLE)
        and text.strip()
    ]


def from_service(environ: Mapping[str, str], faults: list[str]) -> list[Given]:
    """Returns the values in `SM_HP_MP_PARAMETERS`; adds a fault if it is not a JSON object."""
    text = environ.get(SERVICE_VARIABLE, "")
    if not text.strip():
        return []
    accepted = 'a JSON object such as {"partitions": 2, "microbatches": 4}'
    try:
        values = parse_json(text)
    except JsonFault as error:
        what = "not JSON" if isinstance(error, NotJson) else "not JSON that can be used"
        faults.append(
            f"{SERVICE_VARIABLE}: received {shown(text)}, which is {what} ({error}); accepted: "
            f"{accepted}"
        )
        return []
    if not isinstance(values, dict):
        faults.append(f"{SERVICE_VARIABLE}: received {shown(values)}; accepted: {accepted}")
        return []
    return [
        Given(name, value, SERVICE_VARIABLE, text=isinstance(value, str))
        for name, value in values.items()
    ]


def shown(value: Any) -> str:
    """Formats a value and its type for messages."""
    return f"{message_text.shown(value)} ({type(value).__name__})"
