"""Ranks of one machine compare batches without a gather, and lose nothing that a gather gave."""

from __future__ import annotations

from processes import check_ranks

SCRIPT = """
import keras
import numpy as np
import opensmp as smp
from opensmp.distributed.collectives import objects
from opensmp.training.sync.agreement import agreement

smp.init({"partitions": 2, "microbatches": 1})
gathers = []
gather = objects.allgather_objects
def counted(obj, ranks, name="allgather_objects"):
    gathers.append(name)
    return gather(obj, ranks, name)
objects.allgather_objects = counted

def made():
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(1)]))
    model.compile("sgd", "mse")
    return model

x, y = np.ones((64, 4), "f"), np.zeros((64, 1), "f")
model = made()
counts = []
for rows in (16, 64):
    model.fit(x[:rows], y[:rows], batch_size=1, verbose=0)  # traces the step
    del gathers[:]
    model.fit(x[:rows], y[:rows], batch_size=1, verbose=0)
    counts.append(len(gathers))
assert counts[0] == counts[1], counts

def error_of(model, x, y, **options):
    try:
        model.fit(x, y, verbose=0, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"

own = smp.rank() * 4
for _ in range(3):  # each error makes the ranks go on with other pipes
    text = error_of(model, x[: 32 + own], y[: 32 + own], batch_size=4)
    assert "StepError" in text and "not at the same point" in text, text
    text = error_of(model, x + own, y, batch_size=4)
    assert "StepError" in text and "different batches" in text, text
    text = error_of(model, x, y, batch_size=4 if own else 8)
    assert "StepError" in text, text
    assert error_of(model, x, y, batch_size=4) == "none"
    assert agreement._pipes is not None

class Stops(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2 and smp.rank() == 1:
            raise KeyError("a bug of one rank")

text = error_of(model, x, y, batch_size=4, callbacks=[Stops()])
assert "a bug of one rank" in text, text
assert error_of(model, x, y, batch_size=4) == "none"
print("DONE", model.evaluate(x, y, batch_size=4, verbose=0) < 1)
"""


def test_batches_take_no_gather_and_each_difference_is_an_error_in_all_ranks():
    for result in check_ranks(SCRIPT, 2):
        assert result.lines[-1] == "DONE True"
