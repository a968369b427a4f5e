"""Finds results that depend on values of one process only, to send them instead of the values.

The norm of a weight need not be computed where the weight is missing: the programs of all
processes are alike, so the weight's owner computes it too and can send the scalar. Operation names
differ between processes, so values are identified by a digest of the operation, its attributes and
the digests of its inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.execution.multi_process.placer import num_bytes
from opensmp.execution.multi_process.remote_values import Known

Digest = bytes

_LARGEST_CONSTANT = 1 << 16
_NOBODY = -1
"""Process of values that are computed from constants only."""


class Cut(NamedTuple):
    """Values of another process from which something is computed here.

    Attributes:
        values: The values.
        smaller: Results computed from them alone that can be received instead; `values` itself
            unless these results have fewer bytes.
    """

    values: list[Tensor]
    smaller: list[Tensor]


@dataclass(frozen=True)
class _What:
    digest: Digest
    process: int
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Derived:
    """The tensors of a graph that are computed from the values of one process."""

    me: int
    _tensors: Mapping[int, Tensor]
    _what: Mapping[int, _What]
    _live: Collection[int]

    @classmethod
    def of(cls, graph: Any, known: Iterable[Known], live: Mapping[int, Tensor], me: int) -> Derived:
        """Propagates digests through a graph from the values in `known`, each owned by one process.

        `live` maps ids to the tensors that live operations read; `me` is the position in the
        replica.
        """
        tensors: dict[int, Tensor] = {}
        what: dict[int, _What] = {}
        for one in known:
            tensors[id(one.tensor)] = one.tensor
            what[id(one.tensor)] = _What(_hash("value", one.key), one.process, (one.name,))
        for op in graph.get_operations():  # in order of creation
            for tensor, found in zip(op.outputs, _computed(op, what), strict=False):
                if id(tensor) not in what:
                    tensors[id(tensor)], what[id(tensor)] = tensor, found
        return cls(me, tensors, what, live.keys())

    def digest(self, tensor: Tensor) -> Digest:
        """Digest of a tensor's value; equal in all processes for equal computations."""
        return self._what[id(tensor)].digest

    def process(self, tensor: Tensor) -> int:
        """Position in the replica of the process that owns the inputs of a tensor."""
        return self._what[id(tensor)].process

    def name(self, tensor: Tensor) -> str:
        """Names of the values that a tensor is computed from."""
        return ", ".join(self._what[id(tensor)].names)

    def own(self) -> frozenset[Digest]:
        """Digests of the values that are computed from values of this process."""
        return frozenset(w.digest for w in self._what.values() if w.process == self.me)

    def tensor(self, digest: Digest) -> Tensor:
        """The tensor of this process with a digest of `own`."""
        return next(t for key, t in self._tensors.items() if self._what[key].digest == digest)

    def cuts(self, placeholders: Iterable[Known]) -> list[Cut]:
        """The values to receive so that everything else can be computed.

        `placeholders` are the values of other processes that live operations read.
        """
        cuts = []
        for values in self._groups([one.tensor for one in placeholders]):
            edge = self._edge(values)
            smaller = sum(map(num_bytes, edge)) < sum(map(num_bytes, values))
            cuts.append(Cut(values, edge if smaller else values))
        return cuts

    def _groups(self, values: list[Tensor]) -> list[list[Tensor]]:
        """Groups values such that a result computed from several of them lies within one group."""
        group_of: dict[int, list[Tensor]] = {}
        for value in values:
            mine = [value]
            for tensor in self._closure([value]):
                other = group_of.setdefault(id(tensor), mine)
                if other is not mine:
                    other += [each for each in mine if not any(each is o for o in other)]
                    for key in [k for k, group in group_of.items() if group is mine]:
                        group_of[key] = other
                    mine = other
        return list({id(group): group for group in group_of.values()}.values())

    def _closure(self, values: list[Tensor]) -> list[Tensor]:
        """All live tensors computed from `values` and from other values of the same process."""
        found = {id(value): value for value in values}
        stack = list(values)
        while stack:
            for op in stack.pop().consumers():
                for output in op.outputs:
                    if self._is_inside(output) and id(output) not in found:
                        found[id(output)] = output
                        stack.append(output)
        return list(found.values())

    def _is_inside(self, tensor: Tensor) -> bool:
        what = self._what.get(id(tensor))
        is_other = what is not None and what.process not in (self.me, _NOBODY)
        return is_other and id(tensor) in self._live

    def _edge(self, values: list[Tensor]) -> list[Tensor]:
        """The tensors in the closure of `values` that operations outside of it read."""
        edge = []
        for tensor in self._closure(values):
            readers = [op for op in tensor.consumers() if self._runs(op)]
            outside = [op for op in readers if not all(map(self._is_inside, op.outputs))]
            is_result = any(tensor is output for output in tensor.graph.outputs)
            if outside or is_result or not readers:
                edge.append(tensor)
        return edge

    def _runs(self, op: Op) -> bool:
        """Whether an operation runs: it has live outputs or side effects."""
        return (
            not op.outputs
            or any(id(t) in self._live for t in op.outputs)
            or _private.is_stateful(op)
        )


def _computed(op: Op, what: Mapping[int, _What]) -> list[_What]:
    """Digest and origin of each output of an operation; empty if they cannot be determined."""
    if op.type == "Const":
        return [_What(_constant(op), _NOBODY, ())]
    if not op.inputs or _private.is_stateful(op) or op.type.startswith("Placeholder"):
        return []
    read = [what.get(id(tensor)) for tensor in op.inputs]
    before = [one for one in read if one is not None]
    processes = {one.process for one in before} - {_NOBODY}
    if len(before) < len(read) or len(processes) > 1:
        return []
    node = op.node_def
    if any(value.HasField("func") or value.list.func for value in node.attr.values()):
        return []
    attributes = [
        (name, node.attr[name].SerializeToString(deterministic=True))
        for name in sorted(node.attr)
        if not name.startswith("_")
    ]
    names = tuple(dict.fromkeys(name for one in before for name in one.names))
    process = processes.pop() if processes else _NOBODY
    digests = [one.digest for one in before]
    return [
        _What(_hash(op.type, attributes, digests, place), process, names)
        for place in range(len(op.outputs))
    ]


def _constant(op: Op) -> Digest:
    value = op.node_def.attr["value"].tensor
    if value.ByteSize() > _LARGEST_CONSTANT:  # too large to hash: distinct from all others
        return _hash("large", op.name, id(op))
    array = tf.make_ndarray(value)
    return _hash("constant", str(array.dtype), array.shape, array.tobytes())


def _hash(*what: Any) -> Digest:
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
