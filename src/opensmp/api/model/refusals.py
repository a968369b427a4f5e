"""Errors for unsupported gradients through calls of a partitioned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError

_ACTIVATIONS = (
    "A gradient was asked for with respect to an output of model '{name}' that other outputs are "
    "computed from, in a train_step and its like, where the model was called with a whole batch. "
    "Take it in an smp.step function, and call that in the train_step:\n\n"
    "    @smp.step\n"
    "    def gradients_of_activations(x):\n"
    "        with tf.GradientTape() as tape:\n"
    "            activations, outputs = model(x, training=False)\n"
    "            score = outputs[:, 0]\n"
    "        return tape.gradient(score, activations)\n\n"
    "    gradients = gradients_of_activations(x).concat()"
)


def refuse_tape(name: str) -> None:
    """Raises `StepError` if a tape records a call of model `name` outside of a step."""
    if _private.tape_is_active():
        raise StepError(
            f"Model '{name}' was called under a tf.GradientTape outside of an smp.step "
            "function. Gradients of a split model are taken inside a step:\n\n"
            "    @smp.step\n"
            "    def forward_backward(x, y):\n"
            "        with tf.GradientTape() as tape:\n"
            "            loss = loss_fn(y, model(x, training=True))\n"
            "        return tape.gradient(loss, model.trainable_variables), loss\n\n"
            "    gradients, loss = forward_backward(x, y)\n"
            "    gradients = [g.accumulate() for g in gradients]\n\n"
            "For inference under a tape, use `with tape.stop_recording():`."
        )


def refuse_gradients_of_activations(name: str, outputs: Any, tapped: Sequence[int]) -> None:
    """Makes gradients with respect to inner outputs of a whole-batch call raise a `StepError`.

    Outputs of a whole batch are concatenated from microbatches, so no gradient path leads through
    them.

    Args:
        name: Name of the model.
        outputs: A nest of the outputs.
        tapped: Indices of the flat outputs that other outputs are computed from.
    """
    leaves = tf.nest.flatten(outputs, expand_composites=True)
    for index in tapped:
        _private.note_source(leaves[index], StepError(_ACTIVATIONS.format(name=name)))
