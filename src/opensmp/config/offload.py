"""The configuration's `offload`: what partitions keep elsewhere while they do not need it."""

from __future__ import annotations

from typing import Any, NamedTuple

from opensmp.config.kinds import path_of, word_or_json
from opensmp.config.partition_levels import one_of, pairs, partition_number

NONE, RESIDUALS, OPTIMIZER, ALL = "none", "residuals", "optimizer", "all"

LEVELS = (NONE, RESIDUALS, OPTIMIZER, ALL)
"""What can be said of the whole model, or of one partition."""

MOST_RESIDENT = 3
"""Microbatches whose residuals are in memory although they are offloaded: one is used, one is read
for what comes next, and one is written. Partitions that hold no more at once offload nothing."""

Setting = str | tuple[tuple[int, str], ...]
"""A level, or pairs of a partition and its level; other partitions offload nothing."""


class OffloadKind(NamedTuple):
    """A level, or a dict of levels by partition, which becomes sorted pairs."""

    accepted: str = (
        "'none', 'residuals', 'optimizer', 'all', or a dict of these by partition, such as "
        "{0: 'residuals'}"
    )

    def check(self, value: Any) -> Setting:
        """See `opensmp.config.kinds.Kind`."""
        if isinstance(value, str):
            return one_of(value, LEVELS)
        found: dict[int, str] = {}
        for key, level in pairs(value):
            partition = partition_number(key)
            try:
                found[partition] = one_of(level, LEVELS)
            except ValueError as error:
                raise ValueError(f"partition {partition}: {error}") from None
        if not found:
            raise ValueError
        return tuple(sorted(found.items()))

    def read(self, text: str) -> Any:
        """See `opensmp.config.kinds.Kind`."""
        return word_or_json(text)


class FolderKind(NamedTuple):
    """The path of a folder, or None."""

    accepted: str = "the path of a folder, or None"

    def check(self, value: Any) -> str | None:
        """See `opensmp.config.kinds.Kind`."""
        return None if value is None else path_of(value)

    def read(self, text: str) -> str:
        """See `opensmp.config.kinds.Kind`."""
        return text.strip()


def as_dict(setting: Setting) -> str | dict[str, str]:
    """Returns the setting in a form that JSON and `OffloadKind` accept."""
    if isinstance(setting, str):
        return setting
    return {str(partition): level for partition, level in setting}


def partitions_of(setting: Setting) -> tuple[int, ...]:
    """Returns the partitions that the setting names."""
    return () if isinstance(setting, str) else tuple(partition for partition, _ in setting)


def level_of(setting: Setting, partition: int) -> str:
    """Returns the level of a partition."""
    return setting if isinstance(setting, str) else dict(setting).get(partition, NONE)


def offloads_residuals(setting: Setting, partition: int) -> bool:
    """Whether a partition keeps its residuals elsewhere."""
    return level_of(setting, partition) in (RESIDUALS, ALL)


def offloads_optimizer(setting: Setting, partition: int) -> bool:
    """Whether a partition keeps the optimizer's state elsewhere."""
    return level_of(setting, partition) in (OPTIMIZER, ALL)
