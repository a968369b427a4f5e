"""The configuration's `recompute`: which activations the backward pass computes again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opensmp.base.message_text import did_you_mean, shown
from opensmp.config.kinds import word_or_json
from opensmp.config.partition_levels import is_pairs, one_of, pairs, partition_number

NONE, SELECTIVE, FULL, AUTO = "none", "selective", "full", "auto"

LEVELS = (NONE, SELECTIVE, FULL)
"""What can be said of one partition or one layer."""

Setting = str | tuple[tuple[str, Any], ...]
"""A level, `"auto"`, or the pairs of the dict, with the dicts in it as pairs too."""

_PARTS = ("default", "partitions", "layers")


class RecomputeKind(NamedTuple):
    """`"none"`, `"selective"`, `"full"`, `"auto"`, or a dict of levels; a dict becomes pairs."""

    accepted: str = (
        "'none', 'selective', 'full', 'auto', or a dict of levels with the keys 'default', "
        "'partitions' and 'layers'"
    )

    def check(self, value: Any) -> Setting:
        """See `opensmp.config.kinds.Kind`."""
        if isinstance(value, str):
            return one_of(value, (*LEVELS, AUTO))
        if is_pairs(value):
            value = dict(value)
        if not isinstance(value, Mapping) or not value:
            raise ValueError
        for key in value:
            if key not in _PARTS:
                raise ValueError(f"unknown key {shown(key, 40)}; {did_you_mean(key, _PARTS)}")
        default = _level_of("'default'", value.get("default", NONE))
        partitions = {
            partition_number(key): _level_of(f"partition {key}", level)
            for key, level in pairs(value.get("partitions", ()), "partitions")
        }
        layers = []
        for pattern, level in pairs(value.get("layers", ()), "layers"):
            if not isinstance(pattern, str) or not pattern.strip():
                raise ValueError(f"{shown(pattern, 40)} is not the name of a layer")
            layers.append((pattern, _level_of(f"layer {pattern!r}", level)))
        return (
            ("default", default),
            ("partitions", tuple(sorted(partitions.items()))),
            ("layers", tuple(layers)),
        )

    def read(self, text: str) -> Any:
        """See `opensmp.config.kinds.Kind`."""
        return word_or_json(text)


def as_dict(setting: Setting) -> str | dict[str, Any]:
    """Returns the setting in a form that JSON and `RecomputeKind` accept."""
    if isinstance(setting, str):
        return setting
    parts = dict(setting)
    return {
        "default": parts["default"],
        "partitions": {str(key): level for key, level in parts["partitions"]},
        "layers": dict(parts["layers"]),
    }


def partitions_of(setting: Setting) -> tuple[int, ...]:
    """Returns the partitions that have a level of their own."""
    if isinstance(setting, str):
        return ()
    return tuple(partition for partition, _ in dict(setting)["partitions"])


def _level_of(what: str, value: Any) -> str:
    """Returns the level of an entry of the dict, which the error names."""
    if isinstance(value, str) and value == AUTO:
        raise ValueError(f"{what} cannot be 'auto', which is for the whole model alone")
    try:
        return one_of(value, LEVELS)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
