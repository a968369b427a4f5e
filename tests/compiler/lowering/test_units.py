"""Which emitted calls TensorFlow may dissolve in the graph around them."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf
from small import MANUAL, Net, batch, plain_net

import opensmp as smp


def kept_whole(function: Any) -> list[str]:
    """The emitted functions in a step's graph that are marked as not to be inlined."""
    library = function.get_concrete_function(batch()).graph.as_graph_def().library
    names = [
        f.signature.name
        for f in library.function
        if "_noinline" in f.attr and f.attr["_noinline"].b
    ]
    return sorted(name.removeprefix("__inference_")[:2] for name in names)


@pytest.mark.parametrize(
    ("partitions", "microbatches", "expected"),
    [(1, 1, []), (1, 2, ["B0", "F0"]), (2, 1, ["B0", "B1", "F0", "F1", "W1"])],
)
def test_calls_stay_whole_unless_there_is_nothing_to_order(
    smp_init, partitions, microbatches, expected
):
    smp_init({**MANUAL, "partitions": partitions, "microbatches": microbatches})
    model = Net() if partitions == 2 else smp.DistributedModel.from_keras(plain_net())

    @smp.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    assert kept_whole(forward_backward) == expected
