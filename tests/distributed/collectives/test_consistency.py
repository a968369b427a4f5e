from __future__ import annotations

from patience import patient
from processes import check_ranks, run_ranks

MISMATCH = """
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 2})
import keras
import tensorflow as tf

model = smp.DistributedModel.from_keras(
    keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(2)])
)

@smp.step
def forward(x):
    y = model(x)
    return tf.reduce_sum(y) if smp.rank() == 0 else y

try:
    forward(tf.ones([4, 3]))
except smp.StepError as error:
    print("CAUGHT", error)
"""

COUNTING = """
import opensmp as smp

smp.init({"partitions": 2})
from opensmp.distributed.collectives.consistency import agree

print(agree((0, 1), "a step", ["same"]), agree((0, 1), "a step", ["same"]))
"""


def test_a_differing_program_is_an_error_that_names_the_rank_and_the_first_difference():
    for result in check_ranks(MISMATCH, 2):
        assert "CAUGHT The processes do not run the same program" in result.output
        assert "rank 0: " in result.output
        assert "rank 1: " in result.output
        assert "depends on the rank" in result.output


def test_every_trace_has_a_number_of_its_own():
    assert [result.lines[-1] for result in check_ranks(COUNTING, 2)] == ["0 1", "0 1"]


ALONE = """
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 2})
import keras
import tensorflow as tf

model = smp.DistributedModel.from_keras(
    keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(2)])
)

@smp.step
def forward(x):
    return model(x)

@tf.function
def run(x):
    return forward(x).merge()

for number in range(3):
    run(tf.ones([4, 3]))
if smp.rank() == 0:
    run(tf.ones([4, 3]))
"""


def test_a_step_that_the_others_do_not_run_ends_with_a_message():
    first, second = run_ranks(ALONE, 2)
    assert first.code != 0
    assert "rank 1" in first.output
    assert "step" in first.output
    assert first.at - second.at < patient(15) or second.code
