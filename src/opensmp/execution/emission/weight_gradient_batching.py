"""Selects the passes whose calls compute sums over microbatches.

A step needs the sum of a gradient over microbatches. Where the passes that compute weight gradients
have no other use, those of a group of microbatches become one call that computes the sum directly
and faster (see `opensmp.compiler.lowering.weight_gradient_fusion`), or each of them adds its
gradients to the sums of the microbatches before (see `running_sums`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Gradient, Op, Tensor
from opensmp.compiler.lowering.passes import Backward
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.schedule.actions import Action
from opensmp.config import Config
from opensmp.config.pipelines import most_in_flight, row_of
from opensmp.distributed.watchdog.root_cause import Place
from opensmp.execution.emission.task_graph import live_operations

_LARGEST_GROUP = 4


def group_size(num_microbatches: int, config: Config) -> int:
    """Largest number of microbatches whose weight-gradient passes are joined; 1 disables joining.

    Residuals stay in memory until the last microbatch of a group is through, so groups are small,
    and joining is off unless `optimize` is "speed". At least two groups remain, so that the first
    need not wait for the end of the step.
    """
    if config.optimize != "speed":
        return 1
    active = config.active_microbatches
    if active is None:
        row = row_of(config.pipeline)
        held = row.held or most_in_flight
        active = num_microbatches if row.holds_all else held(config.partitions)
    return max(1, min(_LARGEST_GROUP, num_microbatches // 2, active))


@dataclass(frozen=True, eq=False)
class WeightGradientPass:
    """An emitted pass that computes weight gradients: a second half, or a whole backward pass."""

    action: Action
    program: Program
    weights: Backward
    args: Sequence[Tensor]
    results: Sequence[Tensor]
    place: Place


@dataclass(frozen=True, eq=False)
class JointWeightGradient:
    """Weight-gradient passes that were merged into one call."""

    group: tuple[WeightGradientPass, ...]
    gradients: tuple[Gradient | None, ...]

    @property
    def instead(self) -> dict[int, list[Gradient]]:
        """The terms that replace the gradients of each pass, by the ids of `keys`."""
        first, *rest = map(keys, self.group)
        gradients = [gradient for gradient in self.gradients if gradient is not None]
        found = {key: [g] for key, g in zip(first, gradients, strict=True)}
        return found | {key: [] for each in rest for key in each}


class Sums:
    """The gradient sums that a step computes, traced back to their terms."""

    def __init__(
        self,
        rows: Sequence[Sequence[Gradient]],
        halves: Iterable[WeightGradientPass],
        others: Sequence[Tensor],
        effects: Sequence[Op],
    ) -> None:
        self._results = {id(t) for half in halves for t in half.results}
        self._passed: set[Op] = set()  # operations that only add or forward the terms
        self._added: set[int] = set()  # ids of tensors that are added before they become a term
        self._bases = [[t for term in row for t in self._behind(term)] for row in rows]
        self._found: dict[int, Counter[int]] = {}  # tensor to sum number to number of occurrences
        for number, bases in enumerate(self._bases):
            for base in bases:
                self._found.setdefault(id(_key(base)), Counter())[number] += 1
        self._others = {id(t) for t in others}
        roots = [_key(term).op for row in rows for term in row]
        self._live = set(live_operations([*roots, *(t.op for t in others), *effects]))

    def _behind(self, term: Gradient) -> list[Gradient]:
        """Traces a term through additions, identities and bridges to the tensors that it sums."""
        if isinstance(term, tf.IndexedSlices):
            return [term]
        op = term.op
        if id(term) in self._results:
            return [term]
        if op.type not in ("Identity", "AddN") and not _private.is_bridge(op):
            return [term]
        self._passed.add(op)
        inputs = op.inputs if op.type == "AddN" else [op.inputs[term.value_index]]
        found = [t for tensor in inputs for t in self._behind(tensor)]
        if len(inputs) > 1:
            self._added.update(id(_key(t)) for t in found)
        return found

    def is_computed(self, half: WeightGradientPass) -> bool:
        """Whether the step needs a weight-gradient pass: the operation of a result is live."""
        return any(t.op in self._live for t in half.results)

    def alone_read(self, half: WeightGradientPass) -> bool:
        """Whether only the sums read the results of a weight-gradient pass."""
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

    def cover(self, group: Sequence[WeightGradientPass]) -> bool:
        """Whether each sum contains all or none of a group's gradients, each at most once."""
        for alike in zip(*map(keys, group), strict=True):
            first, *rest = (self._found.get(key, Counter()) for key in alike)
            if any(other != first for other in rest) or any(n > 1 for n in first.values()):
                return False
        return True

    def are_terms(self, half: WeightGradientPass) -> bool:
        """Whether no result is added to another gradient of its microbatch first.

        Such a sum, over microbatches first, would be rounded otherwise.
        """
        return not any(key in self._added for key in keys(half))

    def terms(self, instead: Mapping[int, list[Gradient]]) -> list[list[Gradient] | None]:
        """The terms of each sum with some of them replaced; None for sums with none of these."""
        found: list[list[Gradient] | None] = []
        for bases in self._bases:
            terms = [t for base in bases for t in instead.get(id(_key(base)), [base])]
            found.append(terms if any(id(_key(b)) in instead for b in bases) else None)
        return found


def joinable(
    halves: Mapping[Action, WeightGradientPass], sums: Sums, size: int
) -> list[list[WeightGradientPass]]:
    """Groups of at most `size` weight-gradient passes that can be joined."""
    if size == 1:
        return []
    groups = []
    for present in _alike(halves, sums):
        if present[0].action.kind != "W":
            continue
        if not present[0].program.is_worth_joining(present[0].weights):
            continue
        if not all(map(sums.alone_read, present)):
            continue
        cut = [present[i : i + size] for i in range(0, len(present), size)]
        if all(map(sums.cover, cut)):
            groups += [group for group in cut if len(group) > 1]
    return groups


def summable(
    halves: Mapping[Action, WeightGradientPass], sums: Sums
) -> list[list[WeightGradientPass]]:
    """Runs of passes, from the first microbatch on, that can each add to the sums of the last."""
    runs = []
    for present in _alike(halves, sums):
        run = [half for i, half in enumerate(present) if half.action.microbatch == i]
        if len(run) < 2 or not all(sums.alone_read(half) and sums.are_terms(half) for half in run):
            continue
        if any(map(is_dense, run[0].weights.gradient.gradients)) and sums.cover(run):
            runs.append(run)
    return runs


def is_dense(gradient: Gradient | None) -> bool:
    """Whether a gradient is a tensor, which can be added to another one of its shape."""
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices)


def keys(half: WeightGradientPass) -> list[int]:
    """Ids that identify the gradients which a weight-gradient pass returns."""
    gradients = half.weights.gradient.pack(half.results)
    return [id(_key(gradient)) for gradient in gradients if gradient is not None]


def _alike(
    halves: Mapping[Action, WeightGradientPass], sums: Sums
) -> list[list[WeightGradientPass]]:
    """The passes that the step needs, by what they compute, each sorted by microbatch."""
    alike: dict[tuple[str, int, int, Backward], list[WeightGradientPass]] = {}
    for action, half in sorted(halves.items(), key=lambda pair: pair[0].microbatch):
        if sums.is_computed(half):
            key = action.kind, action.segment, action.call, half.weights
            alike.setdefault(key, []).append(half)
    return list(alike.values())


def _key(gradient: Gradient) -> Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
