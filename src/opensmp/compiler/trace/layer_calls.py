"""Layer calls: groups the operations of a traced graph under readable labels.

A call is labelled with the names of the layers around it, without the model's own:
`encoder/block_3/attention`. If a name repeats below the same parent, because a layer is called
twice or two layers share a name, a number is appended: `encoder/dense#2`. Operations outside of
layers, including those of the model's own `call`, have the label `*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from opensmp.compiler.trace.trace import TracedGraph

MODEL = "*"
"""Label of the operations that belong to no layer but the model itself."""

# Keras and TensorFlow number names in the order of creation within a process, so the same model
# gets other numbers if other objects were created before.
# The pattern is for the reversed name, where each match starts at a boundary: forwards, matching
# would be retried from each number of a long row in the middle of a name.
_NUMBERS = re.compile(r"(?:^|(?<=[/#]))(?:[0-9]+_)+|(?:^|(?<=/))[0-9]+#")


class Piece(NamedTuple):
    """Operations of one layer call that are placed as a whole, in graph order."""

    name: str
    operations: tuple[str, ...]


class LayerCall(NamedTuple):
    """One call of one layer, with its own operations but without those of inner layers.

    Attributes:
        label: See the module docstring.
        pieces: Its operations; empty if inner layers do all its work, or if it does nothing, like
            Dropout in inference.
    """

    label: str
    pieces: tuple[Piece, ...]

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of all its operations."""
        return tuple(name for piece in self.pieces for name in piece.operations)


def operation_labels(traced: TracedGraph) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the labels of all layer calls, and the innermost label of each operation.

    The labels are in the order of the calls, the model first; inputs, variables and captures have
    none.
    """
    labels = [MODEL]
    owner = [MODEL] * len(traced.operations)
    seen: dict[str, int] = {}
    around: list[str] = []
    for span in traced.spans:  # ordered by start, outer spans before inner ones
        if span.depth == 0 and span.layer.name == traced.name:
            around = [MODEL]
            label = MODEL
        else:
            del around[span.depth :]
            parent = around[-1] if around else MODEL
            name = span.layer.name if parent == MODEL else f"{parent}/{span.layer.name}"
            seen[name] = seen.get(name, 0) + 1
            label = name if seen[name] == 1 else f"{name}#{seen[name]}"
            labels.append(label)
            around.append(label)
        owner[span.start : span.stop] = [label] * (span.stop - span.start)
    label_of = {
        op.name: label
        for op, label in zip(traced.operations, owner, strict=True)
        if op not in traced.sources
    }
    return tuple(labels), label_of


def layer_calls(
    traced: TracedGraph, groups: Iterable[tuple[str, Sequence[str]]] = ()
) -> tuple[LayerCall, ...]:
    """Divides the operations of a graph among its layer calls.

    Pairs (name, names of operations) of `groups` become pieces; operations in no group form one
    piece per call.
    """
    labels, label_of = operation_labels(traced)
    group_of: dict[str, tuple[int, str]] = {}
    for index, (group, operations) in enumerate(groups):
        group_of.update(dict.fromkeys(operations, (index, group)))
    found: dict[str, dict[tuple[int, str], list[str]]] = {label: {} for label in labels}
    for name, label in label_of.items():
        found[label].setdefault(group_of.get(name, (-1, "operations")), []).append(name)
    return tuple(LayerCall(label, tuple(_pieces(label, pieces))) for label, pieces in found.items())


def _pieces(label: str, groups: dict[tuple[int, str], list[str]]) -> Iterable[Piece]:
    taken: dict[str, int] = {}
    for (_, group), operations in groups.items():
        name = group.removeprefix(f"{label}/") or group
        taken[name] = taken.get(name, 0) + 1
        yield Piece(name if taken[name] == 1 else f"{name}#{taken[name]}", tuple(operations))


def stem(name: str) -> str:
    """Strips the numbers that differ between processes from a label or operation name."""
    return _NUMBERS.sub("", name[::-1])[::-1]


def numbered_stems(operations: Iterable[str]) -> list[tuple[str, int]]:
    """Returns each operation's stem and the number of earlier occurrences of that stem."""
    counts: dict[str, int] = {}
    result = []
    for name in operations:
        key = stem(name)
        result.append((key, counts.get(key, 0)))
        counts[key] = counts.get(key, 0) + 1
    return result
