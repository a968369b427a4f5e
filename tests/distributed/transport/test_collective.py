from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

from opensmp.distributed.transport import collective

ROUND_TRIP = """
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 1, "auto_partition": False, "default_partition": 0})
import keras
import numpy as np
import tensorflow as tf

DTYPES = [
    "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64", "bool", "complex64", "complex128",
]

class Net(smp.DistributedModel):
    '''Makes a tensor of each kind in one process and gives all of them back in the other.'''

    def call(self, x):
        with smp.partition(0):
            made = {name: tf.cast(x, name) for name in DTYPES}
            made["string"] = tf.strings.as_string(x)
            made["large"] = tf.tile(x[None], [3_000_000 // tf.size(x), 1])
            made["static"] = tf.reshape(tf.range(3_000_000, dtype=tf.float32), [3000, 1000])
            made["empty"] = x[:0]
            made["any rank"] = tf.py_function(lambda v: v, [x], tf.float32)
        with smp.partition(1):
            return {name: tf.identity(value) for name, value in made.items()}

model = Net()

@smp.step(input_signature=[tf.TensorSpec([None])])
def forward(x):
    return model(x)

for size in (4, 6, 4):
    x = np.arange(size, dtype="float32") % 2
    outputs = forward(tf.constant(x))
    for name in DTYPES:
        value = outputs[name].outputs[0]
        assert value.dtype == name, name
        assert (tf.cast(value, tf.float32).numpy() == x).all(), name
    assert [float(s) for s in outputs["string"].outputs[0].numpy()] == x.tolist()
    large = outputs["large"].outputs[0].numpy()
    assert large.shape == (3_000_000 // size, size) and (large == x).all()
    assert (outputs["static"].outputs[0].numpy().ravel() == np.arange(3e6, dtype="f")).all()
    assert outputs["empty"].outputs[0].shape == [0]
    assert (outputs["any rank"].outputs[0].numpy() == x).all()
print("SAME")
"""


def test_every_kind_of_tensor_arrives_as_it_left():
    results = check_ranks(ROUND_TRIP, 2)
    assert [result.lines[-1] for result in results] == ["SAME", "SAME"]


UNUSED = """
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0})
import keras
import tensorflow as tf

class Net(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.a, self.b = keras.layers.Dense(3), keras.layers.Dense(3)

    def call(self, x):
        with smp.partition(0):
            x = self.a(x)
        with smp.partition(1):
            return self.b(x)

model = Net()

@smp.step
def forward(x):
    y = model(x)
    return y, tf.reduce_sum(y)

@tf.function
def run(x):
    y, total = forward(x)
    return total.reduce_sum() if smp.rank() == 0 else tf.constant(0.0)

for _ in range(3):
    run(tf.ones([4, 3]))
print("ENDED")
"""


def test_what_a_process_does_not_read_holds_up_nobody():
    results = check_ranks(UNUSED, 2)
    assert [result.lines[-1] for result in results] == ["ENDED", "ENDED"]


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn", "int8", "uint8", "int4", "uint4"])
def test_small_numbers_travel_exactly(name):
    dtype = tf.dtypes.as_dtype(name)
    if dtype.is_floating:
        codes = np.arange(256, dtype=np.uint8).view(dtype.as_numpy_dtype)
    else:
        low, high = (-8, 7) if name == "int4" else (0, 15) if name == "uint4" else dtype.limits
        codes = np.arange(low, high + 1).astype(dtype.as_numpy_dtype)
    tensor = tf.constant(codes)
    packed = collective._pack(tensor)
    spec = tf.TensorSpec(tensor.shape, dtype)
    assert packed.dtype == collective._packed(spec).dtype
    back = collective._unpack(packed, spec)
    assert back.dtype == dtype
    wide = tf.float32 if dtype.is_floating else tf.int32
    np.testing.assert_array_equal(tf.cast(back, wide), codes.astype(wide.as_numpy_dtype))
