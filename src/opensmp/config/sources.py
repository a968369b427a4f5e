"""Where values come from: a dict, the environment, the JSON object of a training service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opensmp.base import message_text
from opensmp.base.strict_json import JsonFault, NotJson, parse_json

ENVIRONMENT_PREFIX = "OPENSMP_"
"""`OPENSMP_PARTITIONS=2` sets the key `partitions`; an empty value counts as not set."""

LAUNCHER_PREFIX = "OPENSMP_RUN_"
"""Variables that the launcher sets for itself; they are no keys."""

IDLE_VARIABLE = "OPENSMP_IDLE_SECONDS"
"""How long a run of several processes may compute nothing; it is no key."""

SERVICE_VARIABLE = "SM_HP_MP_PARAMETERS"
"""The variable in which training services hand over all keys as one JSON object."""

ALIASES: Mapping[str, str] = {"pipeline_parallel_degree": "partitions"}
"""Second names of keys."""


class Given(NamedTuple):
    """A value as one source gave it. `text` marks one that still has to be read."""

    name: str  # as the source spelled it, perhaps an alias
    value: Any
    source: str
    text: bool = False

    @property
    def key(self) -> str:
        """The key that is meant."""
        return ALIASES.get(self.name, self.name)

    def __str__(self) -> str:
        return f"{message_text.plain(self.name)} ({self.source}): received {shown(self.value)}"


def from_dict(values: Any, source: str, faults: list[str]) -> list[Given]:
    """What a dict says; what is no dict is added to `faults`."""
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
    """What the variables `OPENSMP_<KEY>` say."""
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
        and variable != IDLE_VARIABLE
        and text.strip()
    ]


def from_service(environ: Mapping[str, str], faults: list[str]) -> list[Given]:
    """What `SM_HP_MP_PARAMETERS` says; what is no JSON object is added to `faults`."""
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
    """A value and its type, for messages."""
    return f"{message_text.shown(value)} ({type(value).__name__})"
