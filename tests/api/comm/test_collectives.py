from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.errors import CommunicationError, NotInitializedError, StepError

FUNCTIONS = {
    "allreduce": lambda: smp.allreduce(tf.constant(1.0)),
    "broadcast_variables": lambda: smp.broadcast_variables([]),
    "clip_by_global_norm": lambda: smp.clip_by_global_norm([tf.constant(1.0)], 1.0),
}

# A model, and the same in plain Keras; the first layer reads rows of a table.
MODELS = """
import keras, numpy as np, tensorflow as tf

def layers(table):
    first = [keras.layers.Embedding(50, 4), keras.layers.Flatten()] if table else []
    dense = [keras.layers.Dense(8, activation="gelu") for _ in range(3)]
    return [*first, *dense, keras.layers.Dense(3)]

class Plain(keras.Model):
    def __init__(self, table):
        super().__init__()
        self.parts = layers(table)
    def call(self, x, training=None):
        for layer in self.parts:
            x = layer(x)
        return x

class Split(smp.DistributedModel):
    def __init__(self, table):
        super().__init__()
        self.parts = layers(table)
    def call(self, x, training=None):
        for layer in self.parts:
            x = layer(x)
        return x

def batches(table, number=4, size=16):
    rng = np.random.default_rng(0)
    for _ in range(number):
        x = rng.integers(0, 50, (size, 3)) if table else rng.normal(size=(size, 5))
        y = rng.normal(size=(size, 3))
        yield x.astype("int32" if table else "float32"), y.astype("float32")

def gradients_of(model):
    def run(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        return tape.gradient(loss, model.trainable_variables), loss
    return run

def check_equal(split, plain, tolerance):
    from opensmp._private import is_elsewhere
    pairs = [p for p in zip(split.variables, plain.variables) if not is_elsewhere(p[0])]
    assert 0 < len(pairs) and (smp.mp_size() == 1 or len(pairs) < len(plain.variables))
    for a, b in pairs:
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=tolerance, err_msg=a.path)
"""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_before_init_it_is_an_error(name):
    with pytest.raises(NotInitializedError, match=rf"smp\.{name}"):
        FUNCTIONS[name]()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_a_step_it_is_an_error(smp_init, name):
    smp_init({"partitions": 2})
    model = smp.DistributedModel.from_keras(keras.Sequential([keras.layers.Dense(1)]))

    @smp.step
    def step(x):
        FUNCTIONS[name]()
        return model(x)

    with pytest.raises(StepError, match=rf"smp\.{name} was called in an smp\.step function"):
        step(tf.ones([2, 3]))


def test_one_replica_gets_its_nest_back(smp_init):
    smp_init({"partitions": 2})
    table = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([1]), tf.constant([5, 2]))
    given = {"a": [tf.constant([1.0]), None], "b": table}
    result = smp.allreduce(given, op="sum")
    assert result["a"][1] is None
    np.testing.assert_array_equal(result["a"][0], [1.0])
    np.testing.assert_array_equal(tf.convert_to_tensor(result["b"]), tf.convert_to_tensor(table))


def test_unknown_op_group_and_rank_are_errors(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(CommunicationError, match="op='max' is unknown; accepted: 'mean' or 'sum'"):
        smp.allreduce(tf.constant(1.0), op="max")
    with pytest.raises(TypeError, match="group must be a member of"):
        smp.allreduce(tf.constant(1.0), group="dp")
    with pytest.raises(CommunicationError, match="there is no root_rank 3"):
        smp.broadcast_variables([tf.Variable(1.0)], root_rank=3)


def test_ragged_tensor_is_an_error(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(CommunicationError, match="a RaggedTensor cannot be reduced"):
        smp.allreduce(tf.ragged.constant([[1.0], [2.0, 3.0]]))


def test_clipping_in_one_process_is_that_of_tensorflow(smp_init):
    smp_init({"partitions": 2})
    gradients = [tf.constant([3.0, 4.0]), None, tf.constant([12.0])]
    clipped, norm = smp.clip_by_global_norm(gradients, 1.3)
    expected, expected_norm = tf.clip_by_global_norm(gradients, 1.3)
    assert clipped[1] is None
    np.testing.assert_array_equal(clipped[0], expected[0])
    assert float(norm) == float(expected_norm) == 13.0


def test_reduces_between_four_ranks_are_those_of_numpy():
    check_ranks(
        """
        import opensmp as smp
        smp.init()
        import numpy as np, tensorflow as tf
        rank, pair = smp.rank(), np.array(smp.get_dp_group())
        x = tf.constant([1.0, 2.0]) + rank

        def reduce(x):
            table = tf.IndexedSlices(x[None], [smp.dp_rank()], tf.constant([5, 2]))
            short = tf.IndexedSlices(x[None], [1], tf.constant([2, 2]))
            empty = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), tf.constant([5, 2]))
            nest = {"x": x, "none": None, "table": table, "short": short, "empty": empty}
            return (
                smp.allreduce(nest),
                smp.allreduce(x, op="sum", group=smp.WORLD),
                smp.allreduce(empty if rank else table, op="sum", group=smp.WORLD),
                smp.allreduce(tf.cast(x, tf.bfloat16), group=smp.MP_GROUP),
            )

        for function in (reduce, tf.function(reduce)):
            nest, total, of_rank_0, half = function(x)
            np.testing.assert_allclose(nest["x"], pair.mean() + np.array([1, 2]))
            assert nest["none"] is None
            rows = nest["table"]
            assert isinstance(rows, tf.IndexedSlices) and rows.indices.numpy().tolist() == [0, 1]
            np.testing.assert_allclose(rows.values, (pair[:, None] + np.array([1, 2])) / 2)
            assert nest["short"].indices.numpy().tolist() == [1, 1]  # also where rows are few
            of_row = tf.convert_to_tensor(nest["short"])[1]
            np.testing.assert_allclose(of_row, pair.mean() + np.array([1, 2]))
            assert nest["empty"].values.shape == [0, 2]
            np.testing.assert_allclose(total, 4 * np.array([1, 2]) + 6)
            np.testing.assert_allclose(of_rank_0, np.eye(5)[0][:, None] * np.array([1.0, 2.0]))
            assert half.dtype == tf.bfloat16
            expected = np.mean(smp.get_mp_group()) + np.array([1, 2])
            np.testing.assert_allclose(tf.cast(half, tf.float32), expected)
        """,
        4,
        {"partitions": 2},
    )


def test_hybrid_training_is_that_of_plain_keras_on_the_global_batch():
    """Weights, clipping by hand and by the optimizer; replicas begin with other weights."""
    check_ranks(
        "import opensmp as smp\nsmp.init()\n"
        + MODELS
        + """
for table, clip, accumulation in ((False, "tf", None), (True, "smp", None), (False, "keras", 2)):
    norm = 0.05  # below all norms: always in force
    def optimizer():
        return keras.optimizers.Adam(
            0.01,
            global_clipnorm=norm if clip == "keras" else None,
            gradient_accumulation_steps=accumulation,
        )
    keras.utils.set_random_seed(1 + smp.dp_rank())
    split, split_optimizer = Split(table), optimizer()
    keras.utils.set_random_seed(1)
    plain, plain_optimizer = Plain(table), optimizer()
    of_split, of_plain = smp.step(gradients_of(split)), gradients_of(plain)

    @tf.function
    def train_split(x, y):
        gradients, loss = of_split(x, y)
        gradients = [smp.allreduce(g.accumulate()) for g in gradients]
        found = tf.constant(0.0)
        if clip == "smp":
            gradients, found = smp.clip_by_global_norm(gradients, norm)
        elif clip == "tf":  # as in scripts that know nothing of other processes
            gradients, found = tf.clip_by_global_norm([g / 2.0 for g in gradients], norm / 2.0)
            gradients, found = [g * 2.0 for g in gradients], found * 2.0
        split_optimizer.apply_gradients(zip(gradients, split.trainable_variables))
        return smp.allreduce(loss.reduce_mean()), found

    @tf.function
    def train_plain(x, y):
        gradients, loss = of_plain(x, y)
        found = tf.constant(0.0)
        if clip in ("smp", "tf"):
            gradients, found = tf.clip_by_global_norm(gradients, norm)
        plain_optimizer.apply_gradients(zip(gradients, plain.trainable_variables))
        return loss, found

    for x, y in batches(table):
        loss, found = train_split(*smp.shard((x, y)))
        expected, expected_norm = train_plain(x, y)
        assert abs(float(loss) - float(expected)) < 1e-6, (table, clip, loss, expected)
        assert abs(float(found) - float(expected_norm)) < 1e-6, (table, clip, found, expected_norm)
    check_equal(split, plain, 5e-6 if clip == "keras" else 2e-5)
    print("equal:", table, clip)
""",
        4,
        {"partitions": 2, "microbatches": 2},
    )


def test_partition_without_variables_takes_part_in_clipping():
    check_ranks(
        "import opensmp as smp\nsmp.init()\n"
        + MODELS
        + """
import warnings

class Idle(Split):
    def call(self, x, training=None):
        with smp.partition(0):
            for layer in self.parts:
                x = layer(x)
        with smp.partition(1):
            return tf.identity(x) * 1.0

keras.utils.set_random_seed(1)
split = Idle(False)
keras.utils.set_random_seed(1)
plain = Plain(False)
make = lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05)
split_optimizer, plain_optimizer = make(), make()
of_split, of_plain = smp.step(gradients_of(split)), gradients_of(plain)

@tf.function
def train_split(x, y):
    gradients, _ = of_split(x, y)
    gradients = [g.accumulate() for g in gradients]
    split_optimizer.apply_gradients(zip(gradients, split.trainable_variables))

for x, y in batches(False):
    train_split(x, y)
    plain_optimizer.apply_gradients(zip(of_plain(x, y)[0], plain.trainable_variables))
if smp.mp_rank() == 0:
    for a, b in zip(split.variables, plain.variables):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=2e-6)
assert int(split_optimizer.iterations) == 4

# Nobody would answer rank 1, if it asked for the norm: rank 0 has all gradients.
gradients = [g.accumulate() for g in of_split(x, y)[0]]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    clipped, norm = tf.clip_by_global_norm(gradients, 0.05)
assert np.isnan(norm) == (smp.mp_rank() == 1)
assert [str(w.message)[:43] for w in caught] == [
    "The norm of gradients is NaN on this rank: "] * smp.mp_rank(), caught
expected, _ = tf.clip_by_global_norm(of_plain(x, y)[0], 0.05)
for mine, other in zip(clipped, expected):
    if smp.mp_rank() == 0:
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-6)
    else:
        assert isinstance(mine, tf.IndexedSlices) and mine.shape == other.shape
""",
        2,
        {"partitions": 2, "auto_partition": False, "default_partition": 0},
    )


def test_pure_data_parallelism_is_bit_equal_over_power_of_two_replicas():
    """The mean of equal halves' gradients, against the same sums in one process."""
    check_ranks(
        "import opensmp as smp\nsmp.init()\n"
        + MODELS
        + """
keras.utils.set_random_seed(1 + smp.rank())
split, optimizer = Split(False), keras.optimizers.SGD(0.1, momentum=0.9)
keras.utils.set_random_seed(1)
plain, plain_optimizer = Plain(False), keras.optimizers.SGD(0.1, momentum=0.9)
of_split, of_plain = smp.step(gradients_of(split)), gradients_of(plain)

@tf.function
def train_split(x, y):
    gradients, _ = of_split(x, y)
    gradients = smp.allreduce([g.accumulate() for g in gradients])
    optimizer.apply_gradients(zip(gradients, split.trainable_variables))

@tf.function
def train_plain(x, y):
    halves = [of_plain(a, b)[0] for a, b in zip(tf.split(x, 2), tf.split(y, 2))]
    gradients = [(a + b) / 2 for a, b in zip(*halves)]
    plain_optimizer.apply_gradients(zip(gradients, plain.trainable_variables))

for x, y in batches(False):
    train_split(*smp.shard((x, y)))
    train_plain(x, y)
check_equal(split, plain, 0)

before = [v.numpy() for v in split.variables]
for v in split.variables:
    v.assign(v * float(smp.rank()))
smp.broadcast_variables(split.variables, root_rank=1)
for v, value in zip(split.variables, before):
    np.testing.assert_array_equal(v.numpy(), value)
""",
        2,
        {"partitions": 1},
    )


def test_rows_may_be_more_on_one_rank_than_on_another():
    check_ranks(
        """
        import opensmp as smp
        smp.init()
        import numpy as np, tensorflow as tf
        rank = smp.rank()

        def reduce(rows):
            slices = tf.IndexedSlices(
                tf.ones([rows, 2]) * (rank + 1.0), tf.range(rows), tf.constant([4, 2])
            )
            return smp.allreduce(slices, op="sum")

        for rows in ((1, 3), (2, 2), (0, 2), (4, 4)):
            expected = np.zeros([4, 2])
            for other, number in enumerate(rows):
                expected[:number] += other + 1
            for function in (reduce, tf.function(reduce)):
                found = function(rows[rank])
                assert isinstance(found, tf.IndexedSlices)
                assert found.values.shape[0] == sum(rows)
                np.testing.assert_array_equal(tf.convert_to_tensor(found), expected)

        @tf.function(input_signature=[tf.TensorSpec([None])])
        def unknown(x):
            return smp.allreduce(x, op="sum")

        for size in (0, 3, 0):  # arrays of NumPy: their memory is none of TensorFlow's
            np.testing.assert_array_equal(unknown(np.ones([size], "float32")), np.full([size], 2))
        """,
        2,
    )


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ([1.0], "number 0 is of type float"),
        ([tf.constant(1.0), 2], "number 1 is of type int"),
        (3, "received int, which is no list"),
    ],
)
def test_what_is_no_variable_is_refused_before_anything_is_sent(smp_init, given, part):
    smp_init({"partitions": 2})
    with pytest.raises(CommunicationError, match=part):
        smp.broadcast_variables(given)


def test_what_cannot_be_added_up_is_refused_in_one_process_too(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(CommunicationError, match="tensor 0 has the dtype bool"):
        smp.allreduce(tf.constant([True]))
    with pytest.raises(CommunicationError, match="a value of type generator is no tensor"):
        smp.allreduce(i for i in range(3))


def test_the_norm_is_of_double_precision_in_ranks_without_gradients():
    check_ranks(
        """
        import keras, numpy as np, tensorflow as tf
        import opensmp as smp
        smp.init()
        keras.config.set_floatx("float64")
        layers = [keras.layers.Dense(4, trainable=False), keras.layers.Dense(3)]
        plain = keras.Sequential([keras.Input((5,)), *layers])
        model = smp.DistributedModel.from_keras(plain)

        @smp.step
        def gradients_of(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(x, training=True) ** 2)
            return tape.gradient(loss, model.trainable_variables)

        def norm_of(x):
            gradients = [each.accumulate() for each in gradients_of(x)]
            _, norm = smp.clip_by_global_norm(gradients, 0.1)
            return norm * tf.constant(2.0, tf.float64)

        x = tf.constant(np.random.default_rng(0).normal(size=(4, 5)))
        for run in (norm_of, tf.function(norm_of)):
            norms = smp.allgather(float(run(x)))
            assert norms[0] == norms[1] > 0, norms
        """,
        2,
        {"partitions": 2, "microbatches": 2},
    )
