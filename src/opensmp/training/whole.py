"""A call of a model with a whole batch: split, pipelined, put together, differentiable.

What calls the model sees a plain Keras model: outputs for all rows of the batch, also of those
that other replicas computed, masks, losses that layers added, and gradients with respect to the
variables. So whatever is computed from the outputs, such as any loss and any metric, is right.

The price is one more forward pass where gradients are taken: they come from a second run of the
pipeline, to which the gradients of the outputs are given. In it each backward pass can follow
its forward pass at once, and memory is that of a pipeline. It starts from the same state as the
first, so that dropout drops the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError
from opensmp.graph.structure import Structure
from opensmp.graph.variables import is_trainable, tf_variable
from opensmp.hooks import run_post_partition_hooks
from opensmp.program.gradients import is_differentiable
from opensmp.runtime.elsewhere import KeptBy
from opensmp.runtime.fetch import known
from opensmp.runtime.pipeline import Pipeline
from opensmp.runtime.world import World
from opensmp.training.accumulate import Accumulator, sum_over_replicas
from opensmp.training.microbatches import Part, Split, num_rows

Tensor = Any


@dataclass(frozen=True)
class WholeResult:
    """What a call with a whole batch gives.

    Attributes:
        outputs: The model's output, for all rows.
        losses: Losses that layers added; means over the microbatches where they are numbers.
        penalties: Losses of the weights.
    """

    outputs: Any
    losses: list[Tensor]
    penalties: list[Tensor]


def call_whole(
    model: Any, world: World, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> WholeResult:
    """Calls a model with a whole batch, in the graph of a `tf.function` around it.

    Args:
        model: A DistributedModel.
        world: The processes and devices.
        args: Positional arguments, of all replicas' rows.
        kwargs: Keyword arguments.

    Raises:
        StepError: The batch cannot be split, or the outputs cannot be put together.
    """
    nest = Structure.of((args, dict(kwargs))).template  # arrays and variables are tensors there
    rows = num_rows(nest)
    if rows is None and len(world.dp_group) == 1:
        split = Split(0, (Part(0, 0, 0),))
    else:
        split = Split.of(rows or 0, world)
    return _WholeCall(model, world, nest, split).run()


class _WholeCall:
    """The two functions of one call, and what goes between them."""

    def __init__(self, model: Any, world: World, nest: Any, split: Split) -> None:
        self._model, self._world, self._nest, self._split = model, world, nest, split
        self._tensors = [leaf for leaf in tf.nest.flatten(nest) if _is_tensor(leaf)]
        self._masks = [_private.get_mask(tensor) for tensor in self._tensors]
        self._updated: list[Any] = []
        self._template: Any = None

    # --- forwards ------------------------------------------------------------------

    def run(self) -> WholeResult:
        taped = _private.tape_is_active()
        function = tf.function(self._forward, autograph=False)
        # Traced first: it tells what the state is that has to be read before the call.
        function.get_concrete_function(self._tensors, self._masks)
        state = [self._value_of(variable) for variable in self._updated] if taped else []
        with _private.stop_recording():
            found = self._gathered(function(self._tensors, self._masks))
        if taped:
            found = self._connect(found, state)
        outputs = found["outputs"]
        for output, mask, logits in zip(outputs, found["masks"], found["logits"], strict=True):
            if mask is not None:
                _private.set_mask(output, mask)
            if logits is not None:
                _private.set_logits(output, logits)
        packed = tf.nest.pack_sequence_as(self._template, outputs)
        return WholeResult(packed, found["losses"], found["penalties"])

    def _forward(self, tensors: list[Tensor], masks: list[Tensor | None]) -> dict[str, Any]:
        pipeline = _Noting(self._world, len(self._split.parts))
        with pipeline.tracing():
            results = [
                self._run_part(pipeline, index, part)
                for index, part in enumerate(self._parts(tensors, masks))
            ]
            found = self._joined(results)
            found["penalties"] = _private.regularization_losses(self._model)
        found = dict(pipeline.finish_nest(found))
        self._updated = pipeline.updated
        with tf.init_scope():
            run_post_partition_hooks()
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        return found

    def _parts(self, tensors: list[Tensor], masks: list[Tensor | None]) -> list[Any]:
        if not self._split.rows:  # unknown: one microbatch
            return [(tensors, masks)]
        return self._split.take((tensors, masks))

    def _run_part(
        self, pipeline: Pipeline, index: int, part: tuple[list[Tensor], list[Tensor | None]]
    ) -> tuple[Any, list[Tensor]]:
        tensors, masks = part
        for tensor, mask in zip(tensors, masks, strict=True):
            if mask is not None:
                _private.set_mask(tensor, mask)
        pipeline.start_microbatch(index)
        waiting = iter(tensors)
        args, kwargs = tf.nest.map_structure(
            lambda leaf: next(waiting) if _is_tensor(leaf) else leaf, self._nest
        )
        with tf.name_scope(f"microbatch_{index}"):
            result: tuple[Any, list[Tensor]] = self._model._smp_run(
                pipeline, self._world, args, kwargs
            )
        return result

    def _joined(self, results: Sequence[tuple[Any, list[Tensor]]]) -> dict[str, Any]:
        self._template = tf.nest.map_structure(lambda leaf: None, results[0][0])
        flat = [tf.nest.flatten(outputs) for outputs, _ in results]
        masks = [[_mask(leaf) for leaf in leaves] for leaves in flat]
        logits = [[_logits(leaf) for leaf in leaves] for leaves in flat]
        return {
            "outputs": self._join_each(flat),
            "masks": self._join_each(masks),
            "logits": self._join_each(logits),
            "losses": [
                self._join_loss(values)
                for values in zip(*(losses for _, losses in results), strict=True)
            ],
        }

    def _join_each(self, leaves: Sequence[Sequence[Any]]) -> list[Any]:
        joined = []
        for values in zip(*leaves, strict=True):
            is_one = _is_tensor(values[0]) and self._split.rows
            joined.append(self._split.concat(values, self._name) if is_one else values[0])
        return joined

    @property
    def _name(self) -> str:
        return f"An output of model '{self._model.name}'"

    def _join_loss(self, values: Sequence[Tensor]) -> Tensor:
        if not self._split.rows:
            return values[0]
        if _has_rows(values, self._split):
            parts = zip(values, self._split.parts, strict=True)
            return tf.concat([value[: part.counted] for value, part in parts], 0)
        return self._split.mean(values)

    def _gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """The same for the rows of all replicas."""
        split = self._split
        if len(split.replicas) == 1:
            return found
        own = sum(part.counted for part in split.parts)
        gathered: dict[str, Any] = {"penalties": found["penalties"]}
        for key in ("outputs", "masks", "logits"):
            gathered[key] = [
                split.gather(leaf, self._name) if _is_tensor(leaf) else leaf for leaf in found[key]
            ]
        gathered["losses"] = [
            split.gather(loss, self._name)
            if loss.shape.rank and loss.shape[0] == own
            else split.sum(loss)
            for loss in found["losses"]
        ]
        return gathered

    # --- backwards -----------------------------------------------------------------

    def _value_of(self, variable: Any) -> Tensor:
        """What a variable that the call updates is before it."""
        stored = tf_variable(variable)
        if _private.is_elsewhere(variable):
            return tf.zeros(stored.shape, stored.dtype)
        with tf.device(stored.device), _private.not_followed():
            return tf.convert_to_tensor(stored)

    def _connect(self, found: dict[str, Any], state: list[Tensor]) -> dict[str, Any]:
        """Makes the results ones that tapes can differentiate."""
        places = [
            (key, index)
            for key in ("outputs", "logits", "losses", "penalties")
            for index, leaf in enumerate(found[key])
            if self._is_differentiable(leaf)
        ]
        results = [tf.identity(found[key][index]) for key, index in places]
        variables = [v for v in self._model.trainable_variables if is_trainable(v)]
        watched = [
            isinstance(t, tf.Tensor) and is_differentiable(t) and _private.is_watched(t)
            for t in self._tensors
        ]
        inputs = [t for t, wanted in zip(self._tensors, watched, strict=True) if wanted]
        asked: set[int] = set()

        def backward(*upstream: Tensor) -> list[Any]:
            given = {key: [None] * len(found[key]) for key in found}
            for number in sorted(asked):
                key, index = places[number]
                given[key][index] = tf.convert_to_tensor(upstream[number])
            asked.clear()
            return self._gradients(given, variables, watched, state)

        _private.record_call(results, list(map(tf_variable, variables)), inputs, backward)
        connected = {key: list(leaves) for key, leaves in found.items()}
        for number, ((key, index), result) in enumerate(zip(places, results, strict=True)):
            connected[key][index] = _port(result, asked, number)
        return connected

    def _is_differentiable(self, leaf: Any) -> bool:
        if not _is_tensor(leaf) or not leaf.dtype.is_floating:
            return False
        if not isinstance(leaf, tf.Tensor):
            raise StepError(
                f"{self._name} is a {type(leaf).__name__}. Gradients of such an output are taken "
                "in an smp.step function only: write a train_step that calls one."
            )
        return is_differentiable(leaf)

    def _gradients(
        self,
        upstream: dict[str, Any],
        variables: list[Any],
        watched: list[bool],
        state: list[Tensor],
    ) -> list[Any]:
        """Gradients of variables and watched inputs, from those of the results."""

        def run(tensors: Any, masks: Any, given: Any, old: Any) -> Any:
            with _private.recording():
                return self._backward(tensors, masks, given, old, variables, watched)

        function = tf.function(run, autograph=False)
        with _private.stop_recording():
            gradients, of_inputs = function(self._tensors, self._masks, upstream, state)
            if len(self._split.replicas) > 1:
                gradients = sum_over_replicas(gradients, self._split)
                of_inputs = [None if g is None else self._split.gather(g, "") for g in of_inputs]
        return [*known(gradients), *of_inputs]

    def _backward(
        self,
        tensors: list[Tensor],
        masks: list[Tensor | None],
        upstream: dict[str, Any],
        old: list[Tensor],
        variables: list[Any],
        watched: list[bool],
    ) -> Any:
        pipeline = _Replaying(self._world, len(self._split.parts), self._updated, old)
        accumulator = Accumulator(variables)
        of_inputs: list[list[Any]] = []
        with pipeline.tracing():
            for index, part in enumerate(self._parts(tensors, masks)):
                inputs = [t for t, wanted in zip(part[0], watched, strict=True) if wanted]
                with tf.GradientTape() as tape:
                    for tensor in inputs:
                        tape.watch(tensor)
                    outputs, losses = self._run_part(pipeline, index, part)
                targets, given = self._targets(index, outputs, losses, upstream)
                sources = [*map(tf_variable, variables), *inputs]
                gradients = tape.gradient(targets, sources, output_gradients=given)
                accumulator.add(gradients[: len(variables)])
                of_inputs.append(gradients[len(variables) :])
            self._add_penalties(accumulator, upstream["penalties"], variables)
            joined = [
                None if values[0] is None else self._split.concat(values, "a gradient")
                for values in zip(*of_inputs, strict=True)
            ]
            return accumulator.finish(pipeline, joined)

    def _targets(
        self, index: int, outputs: Any, losses: Sequence[Tensor], upstream: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Results of one microbatch that have a gradient, and that."""
        split = self._split
        part = split.parts[index]
        leaves = tf.nest.flatten(outputs)
        values = [*leaves, *map(_logits, leaves)]
        pairs = []
        for value, gradient in zip(
            values, [*upstream["outputs"], *upstream["logits"]], strict=True
        ):
            if gradient is not None:
                rows = split.rows_of(part, gradient) if split.rows else gradient
                pairs.append((value, rows))
        for value, gradient in zip(losses, upstream["losses"], strict=True):
            if gradient is None:
                continue
            if not split.rows:
                pairs.append((value, gradient))
            elif _has_rows([value], Split(split.rows, (part,))):
                if part.counted:
                    pairs.append((value, gradient[part.begin : part.begin + part.size]))
            else:
                fraction = tf.constant(part.counted / split.rows, gradient.dtype)
                pairs.append((value, gradient * fraction))
        return [value for value, _ in pairs], [gradient for _, gradient in pairs]

    def _add_penalties(
        self, accumulator: Accumulator, upstream: Sequence[Tensor | None], variables: list[Any]
    ) -> None:
        if all(gradient is None for gradient in upstream):
            return
        with tf.GradientTape() as tape:
            penalties = _private.regularization_losses(self._model)
        targets, given = [], []
        for penalty, gradient in zip(penalties, upstream, strict=True):
            if gradient is not None:
                targets.append(penalty)
                given.append(gradient / tf.cast(len(self._split.replicas), gradient.dtype))
        sources = list(map(tf_variable, variables))
        accumulator.add(tape.gradient(targets, sources, output_gradients=given))


class _Noting(Pipeline):
    """A pipeline that tells which state it updates."""

    @property
    def updated(self) -> list[Any]:
        """Variables that are not trained and get a new value."""
        return [variable for variable, _ in self._state.values() if not is_trainable(variable)]


class _Replaying(Pipeline):
    """A pipeline that starts from given state and leaves the variables as they are."""

    def __init__(
        self, world: World, num_microbatches: int, variables: Sequence[Any], state: Sequence[Tensor]
    ) -> None:
        super().__init__(world, num_microbatches, joins=True)
        for variable, value in zip(variables, state, strict=True):
            self._state[id(variable)] = variable, value

    def finish(self, results: Sequence[Tensor]) -> list[Tensor | KeptBy]:
        self._state.clear()
        return super().finish(results)


def _is_tensor(leaf: Any) -> bool:
    return bool(tf.is_tensor(leaf))


def _mask(leaf: Any) -> Tensor | None:
    return _private.get_mask(leaf) if _is_tensor(leaf) else None


def _logits(leaf: Any) -> Tensor | None:
    return _private.get_logits(leaf) if _is_tensor(leaf) else None


def _has_rows(values: Sequence[Tensor], split: Split) -> bool:
    """Whether a loss has an entry for each example, rather than being a number."""
    return all(
        value.shape.rank and value.shape[0] == part.size
        for value, part in zip(values, split.parts, strict=True)
    )


def _port(tensor: Tensor, asked: set[int], number: int) -> Tensor:
    """Identity that notes when a gradient comes through: a tape gives zeros where none does."""

    def gradient(upstream: Any) -> list[Any]:
        asked.add(number)
        return [upstream]

    with _private.stop_recording():
        passed = tf.identity(tensor)
    return _private.with_gradient([passed], [tensor], gradient)[0]
