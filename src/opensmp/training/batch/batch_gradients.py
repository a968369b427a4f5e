"""Gradients of a call with a whole batch, to any order.

The call is recorded on tapes as a function of the model's variables and the call's inputs. A
gradient request runs the backward passes of all microbatches from the saved residuals. If another
tape is recording then, the gradients are connected in the same way: their own gradients come from
differentiating the same calls once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.trace.variables import is_trainable, tf_variable
from opensmp.distributed.world import World
from opensmp.execution.autodiff.forward_backward import BackwardPasses, ForwardPasses
from opensmp.execution.autodiff.segment_gradients import port
from opensmp.execution.multi_process.remote_values import known
from opensmp.training.batch.accumulation import Accumulator, sum_over_replicas
from opensmp.training.batch.batch_split import Part, Split

Kind = Literal["rows", "number", "sum"]
"""How a result of the batch follows from those of its microbatches.

- `"rows"`: the concatenation of their rows.
- `"number"`: the mean, weighted by their numbers of rows.
- `"sum"`: the sum, as for the gradient of a variable.
"""

Again = Callable[
    [BackwardPasses, list[Tensor], list[Any]],
    Iterator[tuple[list[Tensor], Callable[[], list[Any]]]],
]


@dataclass(frozen=True, eq=False)
class Called:
    """A completed call with a whole batch.

    `inputs` are the arguments whose gradients may be requested, `given` the tensors and masks of
    the call; `run` calls the model again, one microbatch at a time.
    """

    model: Any
    world: World
    split: Split
    passes: ForwardPasses
    saved: list[Tensor]
    inputs: list[Tensor]
    kinds: list[Kind]
    given: tuple[list[Tensor], list[Any]]
    run: Again


@dataclass(frozen=True, eq=False)
class _Upstream:
    """Upstream gradients of some results of one order."""

    numbers: list[int]
    gradients: list[Tensor]
    kinds: list[Kind]


class Gradients:
    """Makes the results of a call differentiable for tapes."""

    def __init__(self, called: Called) -> None:
        self._called = called
        tracked = [v for v in called.model.trainable_variables if is_trainable(v)]
        unique = {id(v): v for v in (*tracked, *called.passes.wanted)}
        self._variables = list(unique.values())

    def connect(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Returns the results, recorded on tapes as a function of the variables and inputs."""
        return self._connect(list(results), [], list(self._called.kinds))

    def _connect(
        self, results: list[Tensor], upstreams: list[_Upstream], kinds: list[Kind]
    ) -> list[Tensor]:
        """Connects the results of one order for tapes."""
        asked: set[int] = set()
        numbers = [number for number, result in enumerate(results) if result is not None]
        there = [results[number] for number in numbers]
        others = [gradient for each in upstreams for gradient in each.gradients]

        def backward(*given: Tensor) -> list[Any]:
            chosen = [i for i, number in enumerate(numbers) if number in asked]
            asked.clear()
            return self._gradients(
                [
                    *upstreams,
                    _Upstream(
                        [numbers[i] for i in chosen],
                        [tf.convert_to_tensor(given[i]) for i in chosen],
                        [kinds[numbers[i]] for i in chosen],
                    ),
                ]
            )

        variables = list(map(tf_variable, self._variables))
        _private.record_call(there, variables, [*self._called.inputs, *others], backward)
        connected: list[Tensor] = [None] * len(results)
        for number, result in zip(numbers, there, strict=True):
            connected[number] = port(result, asked, number)
        return connected

    def _gradients(self, upstreams: list[_Upstream]) -> list[Any]:
        """Gradients of the highest order's results, with respect to everything they depend on."""
        called = self._called
        again = _private.tape_is_active()
        kinds: list[Kind] = []
        kinds += ["sum"] * len(self._variables)
        kinds += ["rows"] * len(called.inputs)
        kinds += [kind for each in upstreams[:-1] for kind in each.kinds]

        def model_gradients(tensors: Any, masks: Any, saved: Any, given: Any) -> Any:
            own = [
                _Upstream(each.numbers, values, each.kinds)
                for each, values in zip(upstreams, given, strict=True)
            ]
            return _Backward(called, self._variables, saved, own, again).run(tensors, masks, kinds)

        function = tf.function(model_gradients, autograph=False)
        with _private.stop_recording():
            values = [each.gradients for each in upstreams]
            results = self._gathered(function(*called.given, called.saved, values), kinds)
        if again:
            return self._connect(results, upstreams, kinds)
        count = len(self._variables)
        return [*known(results[:count]), *results[count:]]

    def _gathered(self, results: list[Any], kinds: list[Kind]) -> list[Any]:
        """Gathers the rows, and sums the rest, over all replicas."""
        split = self._called.split
        if len(split.replicas) == 1:
            return results
        count = len(self._variables)
        sums = sum_over_replicas(results[:count], split)
        others: list[Any] = []
        for result, kind in zip(results[count:], kinds[count:], strict=True):
            if result is None:
                others.append(None)
            elif kind == "rows":
                others.append(split.gather(result, "A gradient"))
            else:
                others.append(split.sum(result))
        return [*sums, *others]


class _Backward:
    """The backward passes for one gradient request, in a graph of their own."""

    def __init__(
        self,
        called: Called,
        variables: list[Any],
        saved: list[Tensor],
        upstreams: list[_Upstream],
        again: bool,
    ) -> None:
        self._called, self._variables, self._upstreams = called, variables, upstreams
        self._sources = list(map(tf_variable, variables))
        self._dense = again or len(upstreams) > 1
        self._pipeline = BackwardPasses(called.world, called.passes, saved, everywhere=again)

    def run(self, tensors: list[Tensor], masks: list[Any], kinds: list[Kind]) -> list[Any]:
        """The gradients for the rows of this replica."""
        accumulator = Accumulator(self._variables)
        rest: list[list[Any]] = []
        count = len(self._variables)
        pipeline, split = self._pipeline, self._called.split
        with _private.recording(), pipeline.tracing():
            runs = self._called.run(pipeline, tensors, masks)
            for part, (inputs, call) in zip(split.parts, runs, strict=True):
                found = self._differentiate(inputs, call, part)
                accumulator.add(found[:count])
                rest.append(found[count:])
            others = [
                self._join(values, kind)
                for values, kind in zip(zip(*rest, strict=True), kinds[count:], strict=True)
            ]
            gradients, others = accumulator.finish(pipeline, others)
        return [*gradients, *others]

    def _differentiate(
        self, inputs: list[Tensor], call: Callable[[], list[Any]], part: Part
    ) -> list[Any]:
        """The gradients for one microbatch."""
        own = [
            [
                self._take(gradient, kind, part)
                for gradient, kind in zip(each.gradients, each.kinds, strict=True)
            ]
            for each in self._upstreams
        ]
        return self._order(len(own), inputs, call, own)

    def _order(
        self, order: int, inputs: list[Tensor], call: Callable[[], list[Any]], own: list[list[Any]]
    ) -> list[Any]:
        """Results of an order: those of the call for order 0, else gradients of the order below."""
        if not order:
            return call()
        others = [gradient for each in own[: order - 1] for gradient in each]
        with tf.GradientTape() as tape:
            for tensor in (*inputs, *others):
                tape.watch(tensor)
            results = self._order(order - 1, inputs, call, own)
        pairs = [
            (results[number], gradient)
            for number, gradient in zip(
                self._upstreams[order - 1].numbers, own[order - 1], strict=True
            )
            if results[number] is not None
        ]
        sources = [*self._sources, *inputs, *others]
        if not pairs:
            return [None] * len(sources)
        is_last = order == len(self._upstreams)
        with _private.stop_recording() if is_last else contextlib.nullcontext():
            targets, given = zip(*pairs, strict=True)
            gradients = tape.gradient(list(targets), sources, output_gradients=list(given))
            if self._dense:
                return [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        return list(gradients)

    def _take(self, gradient: Tensor, kind: Kind, part: Part) -> Tensor:
        """The part of a result's upstream gradient that belongs to one microbatch."""
        split = self._called.split
        if kind == "sum" or not split.rows:
            return gradient
        if kind == "number":
            return gradient * tf.constant(part.counted / split.rows, gradient.dtype)
        rows = split.rows_of(part, gradient)
        return rows if part.counted else tf.zeros_like(rows)  # the rows belong to another replica

    def _join(self, values: Sequence[Any], kind: Kind) -> Any:
        """Combines the results of this replica's microbatches."""
        split = self._called.split
        if all(value is None for value in values):
            return None
        if not split.rows:
            return values[0]
        if kind == "number":
            return split.mean(values)
        if kind == "sum":
            return tf.add_n(list(values))
        return split.concat(values, "A gradient")
