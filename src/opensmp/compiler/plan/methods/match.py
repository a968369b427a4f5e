"""Applies a plan, loaded from a file or made for another trace of the model, to a traced graph."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from opensmp.base.message_text import counted
from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.methods.build import costs_later, make_plan
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.layer_calls import (
    MODEL,
    LayerCall,
    layer_calls,
    numbered_stems,
    operation_labels,
    stem,
)
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.errors import PlanError

_logger = logging.getLogger("opensmp")
_NUM_NAMED = 4
_SAME_SIZE = 0.01


def fit(plan: Plan, traced: TracedGraph, num_partitions: int, settings: PlanSettings) -> Plan:
    """Applies a loaded plan to the graph of a model, matching layer calls.

    The layer calls of both must be the same, in the same order; numbers that Keras and TensorFlow
    append to names may differ. A layer within one partition may consist of other operations, as
    with another shape, in inference, or with another version of Keras. In a layer that is cut
    inside, operations are matched by name; unknown ones are placed with the preceding operation.

    Raises:
        PlanError: If it is for another number of partitions or another model; the message names the
            first differences and counts them.
    """
    check_partitions(plan, num_partitions)
    labels, _ = operation_labels(traced)
    known = [call.label for call in plan.calls]
    if [stem(label) for label in labels] != [stem(label) for label in known]:
        _refuse(plan, traced, known, labels)
    _warn_of_other_size(plan, traced)
    return _follow(traced, [plan], num_partitions, settings, strict=True)


def check_partitions(plan: Plan, num_partitions: int) -> None:
    """Checks that a plan is for `num_partitions` partitions."""
    if plan.num_partitions != num_partitions:
        raise PlanError(
            f"{_named(plan)}: it has {counted(plan.num_partitions, 'partition')}, but the "
            f"configuration has {num_partitions}. Set 'partitions': {plan.num_partitions}, or make "
            f"a plan for {num_partitions} with `opensmp plan ... --partitions {num_partitions}`."
        )


def follow(traced: TracedGraph, plans: Sequence[Plan], settings: PlanSettings) -> Plan:
    """Returns a plan for another trace of a model (other shapes, inference) with equal placement.

    The first of `plans` that contains a layer call decides.
    """
    return _follow(traced, plans, plans[0].num_partitions, settings, strict=False)


@dataclass(frozen=True)
class Places:
    """The placement of each layer call in a plan, independent of the graph it was made for."""

    calls: tuple[LayerCall, ...]
    partition_of: Mapping[str, int]
    num_partitions: int
    source: str

    @classmethod
    def of(cls, plan: Plan) -> Places:
        """Returns the placement of a plan."""
        return cls(plan.calls, dict(plan.partition_of), plan.num_partitions, plan.source)


def follow_twin(traced: TracedGraph, twin: Places, settings: PlanSettings) -> Plan:
    """Returns a plan with equal placement for a model that has the same layers as another one."""
    return _follow(traced, [twin], twin.num_partitions, settings, strict=False, by_position=True)


def _follow(
    traced: TracedGraph,
    plans: Sequence[Plan | Places],
    num_partitions: int,
    settings: PlanSettings,
    *,
    strict: bool,
    by_position: bool = False,
) -> Plan:
    """Builds a plan with the placement of `plans`, the first of which takes precedence.

    With `strict`, layers that are cut inside must match by operation names. With `by_position`, or
    `strict`, layer calls are matched by order instead of by label.
    """
    calls = layer_calls(traced)
    labels = [call.label for call in calls]
    earlier = _earlier_calls(labels, plans, by_position=strict or by_position)
    place: dict[str, int] = {}
    strangers: list[str] = []
    for call in calls:
        if call.label in earlier:
            known = earlier[call.label]
            found = _recognised(call.operations, known)
            place.update(found)
            # In a layer that is cut inside, operations can only be matched by name.
            if known and 2 * len(found) < min(len(known), len(call.operations)):
                strangers.append(call.label)
    if strict and strangers:
        assert isinstance(plans[0], Plan)
        raise PlanError(
            f"{_named(plans[0])}: it does not fit model '{traced.name}', whose layers have the "
            f"names it expects but consist of other operations: {_listed(strangers)}. Make a new "
            "plan with `opensmp plan`."
        )
    partition_of: dict[str, int] = {}
    # Operations before the first matched one are placed with it.
    partition = next((place[op.name] for op in traced.operations if op.name in place), 0)
    for op in traced.operations:
        if op not in traced.sources:
            partition = place.get(op.name, partition)
            partition_of[op.name] = partition
    return make_plan(
        traced,
        num_partitions,
        partition_of,
        settings=settings,
        source=plans[0].source,
        make_graph=costs_later(traced, settings),
    )


def _earlier_calls(
    labels: Sequence[str], plans: Sequence[Plan | Places], *, by_position: bool
) -> dict[str, dict[str, int]]:
    """Returns for each label the operation placement of the first plan that contains the call."""
    earlier: dict[str, dict[str, int]] = {}
    for plan in plans:
        names = labels if by_position else [call.label for call in plan.calls]
        for name, call in zip(names, plan.calls, strict=True):
            places = {operation: plan.partition_of[operation] for operation in call.operations}
            if places or by_position:
                earlier.setdefault(name, places)
    return earlier


def _recognised(operations: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Returns the partitions of those operations of a call that match an earlier trace of it."""
    everywhere = set(known.values())
    if len(everywhere) == 1:
        return dict.fromkeys(operations, *everywhere)
    place = dict(zip(numbered_stems(known), known.values(), strict=True))
    return {
        name: place[key]
        for name, key in zip(operations, numbered_stems(operations), strict=True)
        if key in place
    }


def _warn_of_other_size(plan: Plan, traced: TracedGraph) -> None:
    """Warns if a plan that fits was balanced for variables of another total size."""
    if plan.graph is None:
        return
    planned = int(plan.graph.parameter_bytes.sum())
    planned += sum(variable.parameter_bytes for variable in plan.graph.shared)
    placeholders = [leaf.placeholder for leaf in traced.variables]
    # Integer state, such as that of a seed, belongs to no unit.
    placeholders = [p for p in placeholders if not p.dtype.is_integer]
    found = sum(p.dtype.size * (p.shape.num_elements() or 0) for p in placeholders)
    if abs(planned - found) > _SAME_SIZE * max(planned, found):
        _logger.warning(
            "%s: it was made for %s of variables, model '%s' has %s. It is used as it is, but "
            "its partitions may be out of balance; make a new one with `opensmp plan`.",
            _named(plan),
            format_bytes(planned),
            traced.name,
            format_bytes(found),
        )


# --- messages -------------------------------------------------------------------------------


def _named(plan: Plan) -> str:
    return f"Plan of '{plan.model}'" + (f" ({plan.source})" if plan.source else "")


def _listed(labels: Sequence[str]) -> str:
    shown = [repr(label) if label != MODEL else "the model's own operations" for label in labels]
    more = f" and {len(labels) - _NUM_NAMED} more" if len(labels) > _NUM_NAMED else ""
    return ", ".join(shown[:_NUM_NAMED]) + more


def _refuse(plan: Plan, traced: TracedGraph, known: list[str], found: Sequence[str]) -> NoReturn:
    """Raises a `PlanError` that describes the differences between the layers of plan and model."""
    left, right = [stem(label) for label in known], [stem(label) for label in found]
    first = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    blocks = matcher.get_matching_blocks() if len(left) * len(right) < 10**7 else []
    in_left = {i for b in blocks for i in range(b.a, b.a + b.size)} or set(range(first))
    in_right = {i for b in blocks for i in range(b.b, b.b + b.size)} or set(range(first))
    only_plan = [label for i, label in enumerate(known) if i not in in_left]
    only_model = [label for i, label in enumerate(found) if i not in in_right]
    lines = [
        f"{_named(plan)}: it does not fit model '{traced.name}': it knows {len(known) - 1} layer "
        f"calls with {len(plan.partition_of)} operations, the model has {len(found) - 1} with "
        f"{len(traced.operations) - len(traced.sources)}.",
        f"  First difference, at call {first}: the plan has {_at(known, first)}, the model has "
        f"{_at(found, first)}.",
    ]
    if only_plan:
        lines.append(f"  Only in the plan ({len(only_plan)}): {_listed(only_plan)}.")
    if only_model:
        lines.append(f"  Only in the model ({len(only_model)}): {_listed(only_model)}.")
    lines.append(
        "  Use the plan with the model it was made for, or make a new one with `opensmp plan` or "
        "`model.plan.save(path)`."
    )
    raise PlanError("\n".join(lines))


def _at(labels: Sequence[str], index: int) -> str:
    return repr(labels[index]) if index < len(labels) else "no more"
