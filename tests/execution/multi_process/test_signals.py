"""What one rank only waits for, without reading it: TensorFlow's optimizer must not remove it."""

from __future__ import annotations

from processes import check_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR

MICROBATCHES = 8

SCRIPT = f"""
import sys
import numpy as np
import opensmp as smp

pipeline, active = sys.argv[1], int(sys.argv[2])
smp.init({{**{TWO_BY_FOUR}, "microbatches": {MICROBATCHES}, "pipeline": pipeline,
          "active_microbatches": active}})
{STEP_OF_TWO}
rows = tf.reshape(tf.range({MICROBATCHES}.0 * 4), [{MICROBATCHES}, 4])
expected = np.sum([np.outer(row, [1.0] * 4) for row in tf.matmul(rows, tf.ones([4, 4]))], 0)

@tf.function
def sums(x):
    gradients, _ = forward(x)
    return [gradient.reduce_sum() for gradient in gradients]

wrong = 0
for _ in range(200):
    later_kernel = sums(rows)[2]
    if smp.rank() == 1:
        wrong += not np.array_equal(later_kernel, expected)
print("wrong", wrong)
"""


def test_few_microbatches_in_flight_never_overwrite_what_was_not_read():
    """The gradients of this loss do not wait for the activations that the weights' ones read."""
    for pipeline, active in (("interleaved", 1), ("interleaved", 2), ("zero_bubble", 2)):
        for result in check_ranks(SCRIPT, 2, args=(pipeline, active), seconds=300):
            assert result.lines[-1] == "wrong 0", (pipeline, active)
