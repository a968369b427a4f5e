"""How much each operation of a model may be recomputed, by partition and by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from opensmp.base.message_text import nearest
from opensmp.config.recompute import AUTO, NONE, Setting


@dataclass(frozen=True)
class Policy:
    """The levels of recomputation: `"none"`, `"selective"` or `"full"`.

    Attributes:
        default: The level of partitions without an entry.
        partitions: Pairs (partition, level).
        layers: Pairs (pattern, level), which override the partitions; of several patterns that a
            layer matches, the last one counts.

    Example:
        >>> policy = Policy("none", ((0, "full"),), (("block_*", "selective"),))
        >>> policy.level(0, "stem/dense"), policy.level(0, "block_3/dense"), policy.level(1, "*")
        ('full', 'selective', 'none')
    """

    default: str = NONE
    partitions: tuple[tuple[int, str], ...] = ()
    layers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, setting: Setting) -> Policy:
        """Returns the policy of a configuration's `recompute`, without what `"auto"` decides."""
        if isinstance(setting, str):
            return cls(NONE if setting == AUTO else setting)
        given = dict(setting)
        return cls(
            str(given["default"]),
            given["partitions"],
            given["layers"],
        )

    def __bool__(self) -> bool:
        levels = (self.default, *(level for _, level in (*self.partitions, *self.layers)))
        return any(level != NONE for level in levels)

    def level(self, partition: int, label: str) -> str:
        """Returns the level of the operations of a layer call.

        Args:
            partition: Partition of the operations.
            label: The layer call, see `opensmp.compiler.trace.layer_calls`.
        """
        found = dict(self.partitions).get(partition, self.default)
        for pattern, level in self.layers:
            if is_match(pattern, label):
                found = level
        return found

    def unmatched(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Returns the patterns that no label matches."""
        known = tuple(labels)
        return tuple(
            pattern
            for pattern, _ in self.layers
            if not any(is_match(pattern, label) for label in known)
        )


def is_match(pattern: str, label: str) -> bool:
    """Returns whether a pattern names a layer call, or a layer around it.

    It may match their path or their name. A pattern without "#" matches all calls of a layer, one
    with it a call alone, such as the second one "dense#2".

    Example:
        >>> is_match("block_?", "block_3/attention"), is_match("block", "block_3")
        (True, False)
        >>> is_match("dense", "dense#2"), is_match("dense#2", "dense#2")
        (True, True)
    """
    parts = label.split("/")
    if "#" not in pattern:
        parts = [part.partition("#")[0] for part in parts]
    around = range(1, len(parts) + 1)
    return any(
        fnmatchcase("/".join(parts[:end]), pattern) or fnmatchcase(parts[end - 1], pattern)
        for end in around
    )


def describe_unmatched(patterns: Collection[str], labels: Iterable[str]) -> str:
    """Returns the error message for patterns that name no layer."""
    known = list(dict.fromkeys(label for label in labels if label != "*"))
    names = list(dict.fromkeys([*known, *(label.rpartition("/")[2] for label in known)]))
    lines = []
    for pattern in patterns:
        near = nearest(pattern, names)
        lines.append(f"{pattern!r}" + (f" (did you mean {near!r}?)" if near else ""))
    some = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
    return (
        f"recompute: no layer is named {', '.join(lines)}. Expected under 'layers': names or "
        f"patterns of layer calls, such as 'block_*', with a level each. The layers are: {some}. "
        "Correct the pattern in the 'recompute' of smp.init."
    )
