"""Rejects `tf.gradients` where the graph does not contain the operations to differentiate."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.errors import StepError
from opensmp.execution.autodiff.segment_gradients import FROM_OUTSIDE, fails_when_run

_REFUSED = "OpensmpWholeCall"
_UNDER_FIT = (
    "tf.gradients was asked for a derivative through a call of a DistributedModel in a train_step, "
    "test_step or compute_loss. Expected: a tf.GradientTape around the call, and its gradient:\n\n"
    "    with tf.GradientTape() as tape:\n"
    "        loss = loss_fn(y, self(x, training=True))\n"
    "    gradients = tape.gradient(loss, self.trainable_variables)\n\n"
    "With respect to an input call `tape.watch(x)` first. Inside of an smp.step function, which a "
    "train_step may call, tf.gradients works."
)


def without_graph_gradients(leaf: Any) -> Any:
    """Wraps a result of a batch call so that only tapes, not `tf.gradients`, can differentiate it.

    `tf.gradients` through the returned tensor raises a StepError. Leaves other than differentiable
    tensors are returned unchanged.
    """
    if not tf.is_tensor(leaf) or not is_differentiable(leaf):
        return leaf
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"Identity": _REFUSED}):
        return tf.identity(leaf)


@tf.RegisterGradient(_REFUSED)
@tf.autograph.experimental.do_not_convert
def _refuse(op: Any, *upstream: Any) -> Any:
    if op is None:  # tf.saved_model.save queries the gradients of all operations
        return None
    if tf.compat.v1.get_default_graph() is op.graph:
        raise StepError(_UNDER_FIT)
    # TensorFlow differentiates an enclosing function before it knows whether the gradient is used.
    return fails_when_run(list(op.inputs), FROM_OUTSIDE, upstream)
