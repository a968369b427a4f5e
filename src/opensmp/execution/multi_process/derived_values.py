"""What a function computes of the values of one process alone, recognised in all processes.

The norm of a weight need not be computed where the weight is not: its process computes it as well,
since the programs are alike, and a number travels in place of the weight. Operations have other
names in other processes, so they are known by what they compute: by a digest of the operation, its
attributes and the digests of what it reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.execution.multi_process.placer import num_bytes
from opensmp.execution.multi_process.remote_values import Known

Op = Any
Tensor = Any
Digest = bytes

_LARGEST_CONSTANT = 1 << 16
_NOBODY = -1
"""In place of the process of what is computed of constants alone."""


class Cut(NamedTuple):
    """Values of another process that something is computed of.

    Attributes:
        values: They.
        smaller: What is computed of them alone and makes them needless, if it is fewer bytes.
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
    """The tensors of a graph that are computed of the values of one process.

    Attributes:
        me: Position of this process in the replica.
    """

    me: int
    _tensors: Mapping[int, Tensor]
    _what: Mapping[int, _What]
    _live: Collection[int]

    @classmethod
    def of(cls, graph: Any, known: Iterable[Known], live: Mapping[int, Tensor], me: int) -> Derived:
        """Follows the operations of a graph from the values that one process has.

        Args:
            graph: The graph of a function.
            known: Those values.
            live: By id, the tensors that something reads.
            me: Position of this process in the replica.
        """
        tensors: dict[int, Tensor] = {}
        what: dict[int, _What] = {}
        for one in known:
            tensors[id(one.tensor)] = one.tensor
            what[id(one.tensor)] = _What(_hash("value", one.key), one.process, (one.name,))
        for op in graph.get_operations():  # in the order they were made
            for tensor, found in zip(op.outputs, _computed(op, what), strict=False):
                if id(tensor) not in what:
                    tensors[id(tensor)], what[id(tensor)] = tensor, found
        return cls(me, tensors, what, live.keys())

    def digest(self, tensor: Tensor) -> Digest:
        """The same for the same value in all processes."""
        return self._what[id(tensor)].digest

    def process(self, tensor: Tensor) -> int:
        """Position in the replica of the process that has what a tensor is computed of."""
        return self._what[id(tensor)].process

    def name(self, tensor: Tensor) -> str:
        """What a tensor is computed of."""
        return ", ".join(self._what[id(tensor)].names)

    def own(self) -> frozenset[Digest]:
        """Digests of what is computed of values of this process."""
        return frozenset(w.digest for w in self._what.values() if w.process == self.me)

    def tensor(self, digest: Digest) -> Tensor:
        """The tensor of this process with a digest of `own`."""
        return next(t for key, t in self._tensors.items() if self._what[key].digest == digest)

    def cuts(self, placeholders: Iterable[Known]) -> list[Cut]:
        """What may be received so that everything can be computed.

        Args:
            placeholders: The values of other processes that something reads.
        """
        cuts = []
        for values in self._groups([one.tensor for one in placeholders]):
            edge = self._edge(values)
            smaller = sum(map(num_bytes, edge)) < sum(map(num_bytes, values))
            cuts.append(Cut(values, edge if smaller else values))
        return cuts

    def _groups(self, values: list[Tensor]) -> list[list[Tensor]]:
        """Values, those together of which something is computed together."""
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
        """All that is computed of them, and of values of the same process, and is read."""
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
        """What is read of all that is computed of them by something else."""
        edge = []
        for tensor in self._closure(values):
            readers = [op for op in tensor.consumers() if self._runs(op)]
            outside = [op for op in readers if not all(map(self._is_inside, op.outputs))]
            is_result = any(tensor is output for output in tensor.graph.outputs)
            if outside or is_result or not readers:
                edge.append(tensor)
        return edge

    def _runs(self, op: Op) -> bool:
        """Whether something reads what an operation gives, or it runs for its effects."""
        return (
            not op.outputs
            or any(id(t) in self._live for t in op.outputs)
            or _private.is_stateful(op)
        )


def _computed(op: Op, what: Mapping[int, _What]) -> list[_What]:
    """Of each result of an operation what it is computed of; none where that is not known."""
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
    if value.ByteSize() > _LARGEST_CONSTANT:  # it is itself alone
        return _hash("large", op.name, id(op))
    array = tf.make_ndarray(value)
    return _hash("constant", str(array.dtype), array.shape, array.tobytes())


def _hash(*what: Any) -> Digest:
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
