"""Which gradients of variables are computed for several microbatches at once, and for which sums.

A step wants the sum of a gradient over microbatches. Where the second halves of backward passes
have nothing else to give, those of a group of microbatches become one call, which gives the sum
at once and takes less time than one after the other (see
`opensmp.compiler.lowering.weight_gradient_fusion`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.lowering.passes import Backward
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.schedule.actions import Action
from opensmp.config import Config
from opensmp.execution.emission.task_graph import live_operations

Op = Any
Tensor = Any
Gradient = Any

_LARGEST_GROUP = 4


def group_size(num_microbatches: int, config: Config) -> int:
    """For how many microbatches gradients are computed at once, at most; 1 for no joining.

    What they are computed from is in memory until the last microbatch of a group is through, so
    that groups are small, and there are none where memory counts most. Two groups at least are
    left, so that the first one need not wait for the end.

    Args:
        num_microbatches: Of a step.
        config: The configuration.
    """
    if config.optimize != "speed":
        return 1
    return max(1, min(_LARGEST_GROUP, num_microbatches // 2, config.active_microbatches))


@dataclass(frozen=True, eq=False)
class SecondHalf:
    """An emitted second half of a backward pass.

    Attributes:
        action: What it does.
        program: The lowered model.
        weights: The second half.
        args: Its arguments.
        results: Its results.
    """

    action: Action
    program: Program
    weights: Backward
    args: Sequence[Tensor]
    results: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Joined:
    """Second halves that became one call.

    Attributes:
        group: They, by microbatch.
        gradients: What the call gives in the place of the gradients of each.
    """

    group: tuple[SecondHalf, ...]
    gradients: tuple[Gradient | None, ...]


class Sums:
    """Sums of gradients that a step wants, and what they are made of.

    Args:
        rows: The terms of each sum.
        halves: The second halves that were emitted.
        others: Further tensors that something reads.
        effects: Operations that run though nothing reads them.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Gradient]],
        halves: Iterable[SecondHalf],
        others: Sequence[Tensor],
        effects: Sequence[Op],
    ) -> None:
        self._results = {id(t) for half in halves for t in half.results}
        self._passed: set[Op] = set()  # operations that add up, behind the terms
        self._bases = [[t for term in row for t in self._behind(term)] for row in rows]
        self._found: dict[int, Counter[int]] = {}  # how often a tensor is in which sum
        for number, bases in enumerate(self._bases):
            for base in bases:
                self._found.setdefault(id(_key(base)), Counter())[number] += 1
        self._others = {id(t) for t in others}
        roots = [_key(term).op for row in rows for term in row]
        self._live = set(live_operations([*roots, *(t.op for t in others), *effects]))

    def _behind(self, term: Gradient) -> list[Gradient]:
        """What a term is the sum of."""
        if isinstance(term, tf.IndexedSlices):
            return [term]
        op = term.op
        if id(term) in self._results:
            return [term]
        if op.type not in ("Identity", "AddN") and not _private.is_bridge(op):
            return [term]
        self._passed.add(op)
        inputs = op.inputs if op.type == "AddN" else [op.inputs[term.value_index]]
        return [t for tensor in inputs for t in self._behind(tensor)]

    def is_computed(self, half: SecondHalf) -> bool:
        """Whether something reads a second half."""
        return any(t.op in self._live for t in half.results)

    def alone_read(self, half: SecondHalf) -> bool:
        """Whether nothing but the sums reads a second half."""
        return all(map(self._is_only_summed, half.results))

    def _is_only_summed(self, tensor: Tensor) -> bool:
        if id(tensor) in self._others:
            return False
        for op in tensor.consumers():
            if op not in self._live:
                continue
            if op not in self._passed:
                return False
            positions = [0]
            if op.type != "AddN":
                positions = [i for i, t in enumerate(op.inputs) if t is tensor]
            if not all(self._is_only_summed(op.outputs[i]) for i in positions):
                return False
        return True

    def cover(self, group: Sequence[SecondHalf]) -> bool:
        """Whether each sum has all or none of the gradients of a group, and each once."""
        for keys in zip(*map(_keys, group), strict=True):
            first, *rest = (self._found.get(key, Counter()) for key in keys)
            if any(other != first for other in rest) or any(n > 1 for n in first.values()):
                return False
        return True

    def terms(self, joined: Iterable[Joined]) -> list[list[Gradient] | None]:
        """The terms of each sum with what was joined; None where nothing was."""
        instead: dict[int, list[Gradient]] = {}
        for each in joined:
            first, *rest = map(_keys, each.group)
            gradients = [gradient for gradient in each.gradients if gradient is not None]
            instead |= {key: [g] for key, g in zip(first, gradients, strict=True)}
            instead |= {key: [] for keys in rest for key in keys}
        found: list[list[Gradient] | None] = []
        for bases in self._bases:
            terms = [t for base in bases for t in instead.get(id(_key(base)), [base])]
            found.append(terms if any(id(_key(b)) in instead for b in bases) else None)
        return found


def joinable(halves: Mapping[Action, SecondHalf], sums: Sums, size: int) -> list[list[SecondHalf]]:
    """The groups of second halves to be joined.

    Args:
        halves: All second halves that were emitted.
        sums: The sums that are wanted.
        size: Most microbatches of a group.
    """
    alike: dict[tuple[int, int, Backward], list[SecondHalf]] = {}
    for action, half in sorted(halves.items(), key=lambda pair: pair[0].microbatch):
        if sums.is_computed(half):
            alike.setdefault((action.segment, action.call, half.weights), []).append(half)
    groups = []
    for (_, _, weights), present in alike.items():
        if not present[0].program.is_worth_joining(weights):
            continue
        if not all(map(sums.alone_read, present)):
            continue
        cut = [present[i : i + size] for i in range(0, len(present), size)]
        if all(map(sums.cover, cut)):
            groups += [group for group in cut if len(group) > 1]
    return groups


def _key(gradient: Gradient) -> Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _keys(half: SecondHalf) -> list[int]:
    """Of each gradient that a second half gives, what tells it from others."""
    gradients = half.weights.gradient.pack(half.results)
    return [id(_key(gradient)) for gradient in gradients if gradient is not None]
