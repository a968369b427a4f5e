"""A model call with a whole batch: splits it, runs the pipeline and joins the outputs.

The caller sees a plain Keras model: outputs for all rows of the batch, including those that other
replicas computed, masks, losses added by layers, and gradients with respect to the variables.
Therefore any loss and any metric computed from the outputs is correct.

The call runs the forward passes of all microbatches. Residuals are kept until a tape requests
gradients; see `opensmp.training.batch.batch_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.variables import is_trainable, tf_variable
from opensmp.distributed.world import World
from opensmp.errors import StepError
from opensmp.execution.autodiff.forward_backward import BackwardPasses, ForwardPasses
from opensmp.execution.autodiff.graph_gradients import without_graph_gradients
from opensmp.execution.models.hooks import run_post_partition_hooks
from opensmp.execution.profiling.building import show_microbatch
from opensmp.training.batch.batch_gradients import Called, Gradients, Kind
from opensmp.training.batch.batch_split import Part, Split, num_rows


@dataclass(frozen=True)
class BatchCallResult:
    """The result of a call with a whole batch.

    Attributes:
        outputs: The model's output, for all rows.
        losses: Losses added by layers; scalar ones are averaged over the microbatches.
    """

    outputs: Any
    losses: list[Tensor]


def call_with_batch(
    model: Any,
    world: World,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    in_one_piece: bool = False,
) -> BatchCallResult:
    """Calls a model with a whole batch, within the graph of a `tf.function`."""
    nest = Structure.of((args, dict(kwargs))).template  # with arrays and variables as tensors
    rows = num_rows(nest)
    if in_one_piece or (rows is None and len(world.dp_group) == 1):
        split = Split(0, (Part(0, 0, 0),))
    else:
        split = Split.of(rows or 0, world)
    return _WholeCall(model, world, nest, split).run()


class _WholeCall:
    """The forward passes of one call, and its joined results."""

    def __init__(self, model: Any, world: World, nest: Any, split: Split) -> None:
        self._model, self._world, self._nest, self._split = model, world, nest, split
        self._tensors = [leaf for leaf in tf.nest.flatten(nest) if _is_tensor(leaf)]
        self._masks = [_private.get_mask(tensor) for tensor in self._tensors]
        self._taped = _private.tape_is_active()
        self._watched = [self._taped and _is_watched(tensor) for tensor in self._tensors]
        self._wanted: dict[int, bool] = {}
        self._passes: ForwardPasses | None = None
        self._template: Any = None
        self._loss_kinds: list[Kind] = []
        self._places: list[tuple[str, int]] = []

    def run(self) -> BatchCallResult:
        function = tf.function(self.model_call, autograph=False)
        with _private.stop_recording():
            found, saved = function(self._tensors, self._masks)
            found = self._gathered(found)
            found = {key: list(map(without_graph_gradients, found[key])) for key in found}
        if self._taped:
            found = self._connect(found, saved)
        outputs = found["outputs"]
        for output, mask, logits in zip(outputs, found["masks"], found["logits"], strict=True):
            if mask is not None:
                _private.set_mask(output, mask)
            if logits is not None:
                _private.set_logits(output, logits)
        packed = tf.nest.pack_sequence_as(self._template, outputs)
        return BatchCallResult(packed, found["losses"])

    def model_call(  # errors have this name
        self, tensors: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        wants = self._wants if self._taped else None
        passes = ForwardPasses(self._world, len(self._split.parts), wants)
        with passes.tracing():
            results = [
                self._run_part(passes, index, part)
                for index, part in enumerate(self._parts(tensors, masks))
            ]
            found = self._joined(results)
        found = dict(passes.finish_nest(found))
        self._passes = passes
        with tf.init_scope():
            run_post_partition_hooks()
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        return found, [_saved(passes.kept(index)) for index in passes.own]

    def _wants(self, variable: Any) -> bool:
        """Whether a tape watches a trainable variable."""
        if id(variable) not in self._wanted:
            self._wanted[id(variable)] = is_trainable(variable) and _private.watches_variable(
                tf_variable(variable)
            )
        return self._wanted[id(variable)]

    def _parts(self, tensors: list[Tensor], masks: list[Tensor | None]) -> list[Any]:
        if not self._split.rows:  # number of rows unknown: one microbatch
            return [(tensors, masks)]
        return self._split.take((tensors, masks))

    def _run_part(
        self,
        pipeline: ForwardPasses | BackwardPasses,
        index: int,
        part: tuple[list[Tensor], list[Tensor | None]],
    ) -> tuple[Any, list[Tensor]]:
        """Calls the model with one microbatch; returns its output and the layers' losses."""
        tensors, masks = part
        for tensor, mask in zip(tensors, masks, strict=True):
            if mask is not None:
                _private.set_mask(tensor, mask)
        pipeline.watch([t for t, watched in zip(tensors, self._watched, strict=True) if watched])
        show_microbatch(index, pipeline.num_microbatches)
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
        losses = list(zip(*(losses for _, losses in results), strict=True))
        self._loss_kinds = [
            "rows" if self._split.rows and self._have_rows(values) else "number"
            for values in losses
        ]
        return {
            "outputs": self._join_each(flat),
            "masks": self._join_each(masks),
            "logits": self._join_each(logits),
            "losses": [
                self._join_loss(values, kind)
                for values, kind in zip(losses, self._loss_kinds, strict=True)
            ],
        }

    def _have_rows(self, losses: Sequence[Tensor]) -> bool:
        """Whether a loss has one entry per example in each microbatch."""
        pairs = zip(losses, self._split.parts, strict=True)
        return all(self._split.has_rows(loss, part, self._model.name) for loss, part in pairs)

    def _join_each(self, leaves: Sequence[Sequence[Any]]) -> list[Any]:
        joined = []
        for values in zip(*leaves, strict=True):
            is_one = _is_tensor(values[0]) and self._split.rows
            joined.append(self._split.concat(values, self._name) if is_one else values[0])
        return joined

    @property
    def _name(self) -> str:
        return f"An output of model '{self._model.name}'"

    def _join_loss(self, values: Sequence[Tensor], kind: Kind) -> Tensor:
        if not self._split.rows:
            return values[0]
        if kind == "rows":
            parts = zip(values, self._split.parts, strict=True)
            return tf.concat([value[: part.counted] for value, part in parts], 0)
        return self._split.mean(values)

    def _gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """Gathers the rows of all replicas."""
        split = self._split
        if len(split.replicas) == 1:
            return found
        gathered: dict[str, Any] = {}
        for key in ("outputs", "masks", "logits"):
            gathered[key] = [
                split.gather(leaf, self._name) if _is_tensor(leaf) else leaf for leaf in found[key]
            ]
        gathered["losses"] = [
            split.gather(loss, self._name) if kind == "rows" else split.sum(loss)
            for loss, kind in zip(found["losses"], self._loss_kinds, strict=True)
        ]
        return gathered

    # --- gradients -----------------------------------------------------------------

    def _connect(self, found: dict[str, Any], saved: list[Tensor]) -> dict[str, Any]:
        """Makes the results differentiable for tapes."""
        self._places = places = [
            (key, index)
            for key in ("outputs", "logits", "losses")
            for index, leaf in enumerate(found[key])
            if self._is_differentiable(leaf)
        ]
        results = [tf.identity(found[key][index]) for key, index in places]
        assert self._passes is not None
        called = Called(
            model=self._model,
            world=self._world,
            split=self._split,
            passes=self._passes,
            saved=saved,
            inputs=[t for t, watched in zip(self._tensors, self._watched, strict=True) if watched],
            kinds=[self._loss_kinds[i] if key == "losses" else "rows" for key, i in places],
            given=(self._tensors, self._masks),
            run=self._run_again,
        )
        connected = {key: list(leaves) for key, leaves in found.items()}
        for (key, index), result in zip(places, Gradients(called).connect(results), strict=True):
            connected[key][index] = result
        return connected

    def _run_again(
        self, passes: BackwardPasses, tensors: list[Tensor], masks: list[Tensor | None]
    ) -> Iterator[tuple[list[Tensor], Callable[[], list[Any]]]]:
        """Yields each microbatch's watched inputs and a function that calls the model with it.

        The function returns the differentiable results, in the order of `Called.kinds`.
        """
        for index, part in enumerate(self._parts(tensors, masks)):

            def run(index: int = index, part: Any = part) -> list[Any]:
                outputs, losses = self._run_part(passes, index, part)
                leaves = tf.nest.flatten(outputs)
                found = {"outputs": leaves, "logits": list(map(_logits, leaves)), "losses": losses}
                return [found[key][i] for key, i in self._places]

            yield [t for t, w in zip(part[0], self._watched, strict=True) if w], run

    def _is_differentiable(self, leaf: Any) -> bool:
        if not _is_tensor(leaf) or not leaf.dtype.is_floating:
            return False
        if not isinstance(leaf, tf.Tensor):
            raise StepError(
                f"{self._name} is a {type(leaf).__name__}. Gradients of such an output are taken "
                "in an smp.step function only: write a train_step that calls one."
            )
        return is_differentiable(leaf)


def _saved(tensor: Tensor) -> Tensor:
    """A tensor for the backward passes only: an enclosing function takes no gradient through it."""
    with tf.device(tensor.device):
        value = tf.stop_gradient(tensor)
    _private.copy_handle_data(tensor, value)
    return value


def _is_watched(tensor: Tensor) -> bool:
    return bool(
        isinstance(tensor, tf.Tensor) and is_differentiable(tensor) and _private.is_watched(tensor)
    )


def _is_tensor(leaf: Any) -> bool:
    return bool(tf.is_tensor(leaf))


def _mask(leaf: Any) -> Tensor | None:
    return _private.get_mask(leaf) if _is_tensor(leaf) else None


def _logits(leaf: Any) -> Tensor | None:
    return _private.get_logits(leaf) if _is_tensor(leaf) else None
