"""Loss and gradients by microbatch, for losses of a batch that are sums over its microbatches.

The backward pass of a microbatch then depends on no other microbatch, so that the schedule may run
it early, and outputs of the whole batch are only needed for metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.garbage import collected_once
from opensmp.base.types import Tensor
from opensmp.compiler.trace.variables import tf_variable
from opensmp.distributed.world import World
from opensmp.execution.emission.model_traces import ModelTraces
from opensmp.execution.emission.pipeline import Pipeline
from opensmp.execution.models.hooks import run_post_partition_hooks
from opensmp.execution.multi_process.remote_values import known
from opensmp.execution.profiling.building import show_microbatch
from opensmp.execution.profiling.timestamps import FIT, Stamps, has_listeners
from opensmp.execution.warm_up import warming_up
from opensmp.training.batch.accumulation import Accumulator, sum_over_replicas
from opensmp.training.batch.batch_split import Split, num_rows
from opensmp.training.batch.loss_reduction import Kind, given_kind, outputs_allow_it


class NotSeparable(Exception):
    """The loss of the batch must be computed from all outputs together."""


@dataclass(frozen=True)
class Separate:
    """Loss and gradients of a batch.

    Attributes:
        loss: The total loss.
        gradients: For each trainable weight the gradient of the loss, as scaled by the optimizer.
        outputs: The model's output for all rows; None if no metric needs it.
    """

    loss: Tensor
    gradients: list[Any]
    outputs: Any


def kind_of_model(model: Any) -> Kind | None:
    """How a compiled model's loss can be divided by microbatch; its outputs may still forbid it."""
    plain = keras.Model
    is_own = type(model).train_step is plain.train_step
    is_own &= type(model).compute_loss is plain.compute_loss
    if not is_own or model.optimizer is None:
        return None
    return "mean" if model.loss is None else given_kind(model.loss)


def loss_and_gradients(model: Any, world: World, data: Any, kind: Kind) -> Separate:
    """Runs the forward and backward passes of one batch of `fit`, for a compiled model.

    `kind` says how the batch's loss follows from those of its microbatches.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    rows = num_rows(x)
    if rows is None:
        raise NotSeparable
    split = Split.of(rows, world)
    return _Separate(model, world, split, kind).run(x, y, sample_weight)


class _Separate:
    def __init__(self, model: Any, world: World, split: Split, kind: Kind) -> None:
        self._model, self._world, self._split, self._kind = model, world, split, kind
        self._loss = _private.compiled_loss(model)
        self._wants_outputs = (
            _private.compiled_metrics(model) is not None
            or type(model).compute_metrics is not keras.Model.compute_metrics
        )
        self._template: Any = None
        self._traces: ModelTraces | None = None

    def run(self, x: Any, y: Any, sample_weight: Any) -> Separate:
        self._make_ready(x, y, sample_weight)
        weights = list(self._model.trainable_weights)
        if not weights:
            raise NotSeparable
        inner = tf.function(self.train_step, autograph=False)
        with collected_once():
            loss, trackers, outputs, gradients = inner(x, y, sample_weight)
        split = self._split
        if len(split.replicas) > 1:
            loss = split.sum(loss)
            trackers = [split.sum(value) for value in trackers]
            outputs = [None if leaf is None else split.gather(leaf, "") for leaf in outputs]
        for metric, value in zip(self._metrics, trackers, strict=True):
            _private.track(metric, value, split.rows)
        gradients = sum_over_replicas(gradients, split)
        packed = tf.nest.pack_sequence_as(self._template, outputs) if outputs else None
        return Separate(loss, known(gradients), packed)

    @property
    def _metrics(self) -> list[Any]:
        return [] if self._loss is None else list(self._loss.metrics)

    def _make_ready(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Partitions the model, and creates the variables that the step needs.

        Variables created during the step's trace would require a second trace.
        """
        model = self._model
        ready = model._smp_partitions.is_done(self._world) and model.optimizer.built
        if ready and (self._loss is None or self._loss.built):
            return
        with warming_up(self._world, len(self._split.parts), joins=True) as self._traces:
            first = self._split.take((x, y, sample_weight))[0]
            with tf.GradientTape():  # lowers the model as in the run that counts
                outputs = _private.call_in_training(model, first[0])
            if not outputs_allow_it(outputs):
                raise NotSeparable
        with tf.init_scope():
            if self._loss is not None and not self._loss.built:
                _private.build_loss(self._loss, first[1], outputs)
            _private.build_metrics(model, y, outputs)
            if not model.optimizer.built:
                with keras.name_scope(model.optimizer.name):
                    model.optimizer.build(model.trainable_weights)
                model.optimizer.built = True

    def train_step(self, x: Any, y: Any, sample_weight: Any) -> Any:  # errors have this name
        model, split = self._model, self._split
        traces, self._traces = self._traces, None
        stamps = Stamps() if has_listeners() else None
        pipeline = Pipeline(self._world, len(split.parts), stamps, joins=True, traces=traces)
        accumulator = Accumulator(model.trainable_weights)
        sources = [tf_variable(weight) for weight in model.trainable_weights]
        losses, trackers, outputs = [], [], []
        with pipeline.tracing():
            for index, part in enumerate(split.take((x, y, sample_weight))):
                show_microbatch(index, len(split.parts))
                pipeline.start_microbatch(index)
                with tf.name_scope(f"microbatch_{index}"):
                    with tf.GradientTape() as tape:
                        predicted, loss, tracked = self._loss_of(index, *part)
                        scaled = model.optimizer.scale_loss(loss)
                    accumulator.add(tape.gradient(scaled, sources))
                losses.append(loss)
                trackers.append(tracked)
                outputs.append(predicted)
            losses += self._penalise(accumulator, sources)
            loss = tf.add_n(losses)
            tracked = [split.mean(values) for values in zip(*trackers, strict=True)]
            joined = self._join(outputs) if self._wants_outputs else []
            gradients, (loss, tracked, joined) = accumulator.finish(
                pipeline, (loss, tracked, joined)
            )
        here = self._world
        if stamps is not None and pipeline.schedule is not None:
            stamps.deliver(FIT, pipeline.schedule.orders, here.devices, here.my_partitions)
        with tf.init_scope():
            run_post_partition_hooks()
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        pipeline.release()
        return loss, tracked, joined, gradients

    def _loss_of(
        self, index: int, x: Any, y: Any, sample_weight: Any
    ) -> tuple[Any, Tensor, list[Tensor]]:
        """One microbatch's output, its contribution to the loss, and its loss metrics' values."""
        split = self._split
        fraction = split.fractions[index]
        outputs = _private.call_in_training(self._model, x)
        if not outputs_allow_it(outputs):
            raise NotSeparable
        terms, tracked = [], []
        if self._loss is not None:
            with _private.tracked_values(self._metrics) as values:
                loss = self._loss(y, outputs, sample_weight)
            tracked = [values[id(metric)] for metric in self._metrics]
            if loss is not None:
                terms.append(_times(loss, fraction if self._kind == "mean" else 1.0))
        for loss in _private.own_losses(self._model):
            has_rows = split.has_rows(loss, split.parts[index], self._model.name)
            terms.append(_times(keras.ops.sum(_float(loss)), 1.0 if has_rows else fraction))
        if split.parts[index].counted == 0:
            terms = [_times(term, 0.0) for term in terms]
        if not terms and not _private.regularization_losses(self._model):
            raise NotSeparable  # Keras reports that there is no loss
        return outputs, keras.ops.sum(terms) if terms else tf.zeros([]), tracked

    def _penalise(self, accumulator: Accumulator, sources: list[Any]) -> list[Tensor]:
        """Adds the regularization losses of the weights, once for the whole batch."""
        with tf.GradientTape() as tape:
            found = _private.regularization_losses(self._model)
            if not found:
                return []
            share = 1.0 / len(self._split.replicas)  # each replica adds them
            terms = [_times(keras.ops.sum(_float(loss)), share) for loss in found]
            total = keras.ops.sum(terms)
            scaled = self._model.optimizer.scale_loss(total)
        accumulator.add(tape.gradient(scaled, sources))
        return [total]

    def _join(self, outputs: Sequence[Any]) -> list[Tensor]:
        self._template = tf.nest.map_structure(lambda leaf: None, outputs[0])
        name = f"An output of model '{self._model.name}'"
        return [
            None if values[0] is None else self._split.concat(values, name)
            for values in zip(*map(tf.nest.flatten, outputs), strict=True)
        ]


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * tf.constant(factor, value.dtype)


def _float(loss: Tensor) -> Tensor:
    return loss if loss.dtype.is_floating else tf.cast(loss, keras.config.floatx())
