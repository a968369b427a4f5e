"""What people do with the output of a step whose reduction they have forgotten."""

from __future__ import annotations

import math
import operator
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import Net, batch

import opensmp as smp
from opensmp.errors import StepError

NUMBERS = (1.0, np.float32(1.0), np.ones(2, "float32"))
BINARY = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.matmul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.and_,
    operator.or_,
    operator.xor,
    operator.lshift,
    operator.rshift,
    divmod,
)
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
OF_ITSELF = (
    operator.neg,
    operator.pos,
    operator.invert,
    operator.index,
    abs,
    round,
    bool,
    int,
    float,
    complex,
    math.floor,
    math.ceil,
    math.trunc,
    math.sqrt,
    range,
)


def loss(count: int = 2) -> smp.StepOutput:
    return smp.StepOutput([tf.constant(float(i)) for i in range(count)])


def gradient() -> smp.StepOutput:
    return smp.StepOutput([tf.ones([2, 3]), tf.ones([2, 3])])


def error_of(use, where: str = "eager") -> str:
    """The message of the error; it is one sentence."""

    def run():
        use()

    with pytest.raises(StepError) as error:
        (run if where == "eager" else tf.function(run))()
    message = str(error.value)
    assert "\n" not in message
    assert "which has one value for each microbatch and none for the whole batch: call" in message
    assert message.count(". ") == 0
    return message


class TestOperators:
    @pytest.mark.parametrize("where", ["eager", "graph"])
    @pytest.mark.parametrize("operation", [*BINARY, *COMPARISONS], ids=lambda op: op.__name__)
    def test_with_numbers_arrays_and_tensors_on_either_side(self, operation, where):
        def others():
            return (*NUMBERS, tf.constant(1.0), tf.Variable(1.0) if where == "eager" else 1)

        for other in others():
            assert "loss.reduce_mean()" in error_of(lambda: operation(loss(), other), where)  # noqa: B023
            assert "loss.reduce_mean()" in error_of(lambda: operation(other, loss()), where)  # noqa: B023
        assert "loss.reduce_mean()" in error_of(lambda: operation(loss(), loss()), where)

    def test_the_operator_is_named(self):
        assert error_of(lambda: loss() + 1).startswith("The operator + is not possible with")
        assert error_of(lambda: 1 - loss()).startswith("The operator - is not possible with")
        assert error_of(lambda: loss() < 1).startswith("The operator < is not possible with")
        assert error_of(lambda: float(loss())).startswith("float() is not possible with")

    def test_totals(self):
        def add_up():
            total = 0.0
            total += loss()

        for use in (add_up, lambda: sum([loss(), loss()]), lambda: max(loss(), 1.0)):
            error_of(use)

    @pytest.mark.parametrize("operation", OF_ITSELF, ids=lambda op: op.__name__)
    @pytest.mark.parametrize("count", [1, 2])
    def test_of_itself_also_with_one_microbatch(self, operation, count):
        assert "reduce_mean()" in error_of(lambda: operation(loss(count)))

    @pytest.mark.parametrize("where", ["eager", "graph"])
    def test_a_condition(self, where):
        def use():
            if loss():
                pass

        assert error_of(use, where).startswith("bool(), or a condition, is not possible")

    def test_formats(self):
        for use in (lambda: f"{loss():.3f}", lambda: f"{loss():>8}", lambda: "%.3f" % loss()):  # noqa: UP031
            error_of(use)
        assert error_of(lambda: format(loss(), ".3f")).startswith("The format '.3f' is not")


class TestAttributes:
    @pytest.mark.parametrize(
        "name", ["shape", "dtype", "numpy", "item", "tolist", "device", "ndim", "mean"]
    )
    def test_those_of_tensors(self, name):
        message = error_of(lambda: getattr(gradient(), name))
        assert message.startswith(f"`.{name}` is not possible")

    def test_are_absent_for_who_asks(self):
        assert not hasattr(loss(), "shape")
        assert getattr(loss(), "numpy", None) is None

    def test_others_are_ordinary_errors(self):
        with pytest.raises(AttributeError, match="no attribute 'reduce_men'"):
            loss().reduce_men()

    @pytest.mark.parametrize("index", [(0, 1), (slice(None), 0), Ellipsis, None, (..., 0), 0.5])
    def test_rows_and_columns(self, index):
        assert "`merge()`" in error_of(lambda: gradient()[index])


def scaling() -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())


LIBRARIES = {
    "tf.add": lambda: tf.add(loss(), 1.0),
    "tf.maximum": lambda: tf.maximum(loss(), 0.0),
    "tf.cast": lambda: tf.cast(loss(), tf.float64),
    "tf.identity": lambda: tf.identity(loss()),
    "tf.stop_gradient": lambda: tf.stop_gradient(loss()),
    "tf.convert_to_tensor": lambda: tf.convert_to_tensor(loss()),
    "tf.stack": lambda: tf.stack([loss(), loss()]),
    "tf.concat": lambda: tf.concat([gradient(), gradient()], 0),
    "tf.add_n": lambda: tf.add_n([loss(), loss()]),
    "tf.reduce_mean": lambda: tf.reduce_mean([loss(), loss()]),
    "tf.norm": lambda: tf.norm(gradient()),
    "tf.clip_by_global_norm": lambda: tf.clip_by_global_norm([gradient()], 1.0),
    "tf.clip_by_norm": lambda: tf.clip_by_norm(gradient(), 1.0),
    "tf.reshape": lambda: tf.reshape(gradient(), [-1]),
    "tf.argmax": lambda: tf.argmax(gradient(), -1),
    "tf.debugging.check_numerics": lambda: tf.debugging.check_numerics(loss(), ""),
    "tf.shape": lambda: tf.shape(gradient()),
    "numpy.mean": lambda: np.mean(loss()),
    "numpy.exp": lambda: np.exp(loss()),
    "numpy.add": lambda: np.float32(1.0) + loss(),
    "Use as an array, in NumPy,": lambda: np.asarray(loss()),
    "Use as an array, in NumPy, ": lambda: np.mean([loss(), loss()]),
}
KERAS = {
    "metric": lambda: keras.metrics.Mean().update_state(loss()),
    "metric of two": lambda: keras.metrics.MeanSquaredError().update_state(gradient(), gradient()),
    "loss": lambda: keras.losses.MeanSquaredError()(gradient(), gradient()),
    "function": lambda: keras.ops.mean(gradient()),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()).scale_loss(
        loss()
    ),
    "progress": lambda: keras.utils.Progbar(2, verbose=0).update(1, [("loss", loss())]),
}


class TestLibraries:
    @pytest.mark.parametrize("where", ["eager", "graph"])
    @pytest.mark.parametrize("name", LIBRARIES)
    def test_functions_of_tensorflow_and_numpy_are_named(self, name, where):
        message = error_of(LIBRARIES[name], where)
        assert message.startswith(f"{name.strip()} is not possible with StepOutput(2 microbatches")

    @pytest.mark.parametrize("where", ["eager", "graph"])
    @pytest.mark.parametrize("name", KERAS)
    def test_keras(self, name, where):
        error_of(KERAS[name], where)


class TestOptimizers:
    @pytest.mark.parametrize("where", ["eager", "graph"])
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("method", ["apply", "apply_gradients"])
    def test_gradients_are_to_be_accumulated(self, where, scaled, method, smp_init):
        smp_init({"partitions": 1})
        variable = keras.Variable(np.ones([2, 3]), name="kernel")
        optimizer = keras.optimizers.Adam(global_clipnorm=1.0)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build([variable])

        def use():
            if method == "apply":
                optimizer.apply([gradient()], [variable])
            else:
                optimizer.apply_gradients([(gradient(), variable)])

        message = error_of(use, where)
        assert "[g.accumulate() for g in gradients]" in message
        assert "reduce_mean" not in message
        assert scaled or "'kernel'" in message

    def test_the_gradient_of_a_number_too(self, smp_init):
        smp_init({"partitions": 1})
        variable = keras.Variable(1.0)
        message = error_of(lambda: keras.optimizers.SGD().apply([loss()], [variable]))
        assert "accumulate()" in message

    @pytest.mark.parametrize("where", ["eager", "graph"])
    def test_of_a_real_step(self, where, smp_init):
        smp_init({"partitions": 2, "microbatches": 2})
        model = Net()

        @smp.step
        def forward_backward(x):
            with tf.GradientTape() as tape:
                mean = tf.reduce_mean(model(x) ** 2)
            return tape.gradient(mean, model.trainable_variables), mean

        forward_backward(batch(4))
        optimizer = keras.optimizers.SGD()
        optimizer.build(model.trainable_variables)

        def forgotten():
            gradients, _ = forward_backward(batch(4))
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        assert "g.accumulate()" in error_of(forgotten, where)
        assert "loss.reduce_mean()" in error_of(lambda: forward_backward(batch(4))[1] * 2, where)


class TestSteps:
    @pytest.mark.parametrize("name", ["train", "test", "predict"])
    @pytest.mark.parametrize("key", ["loss", None])
    def test_of_a_trainer_do_not_return_it(self, name, key, smp_init):
        smp_init({"partitions": 2, "microbatches": 2})

        class Model(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.layer = keras.layers.Dense(1)

            def call(self, x):
                return self.layer(x)

        @smp.step
        def mean(x):
            return tf.reduce_mean(model(x))

        def step(self, data):
            return mean(batch(4)) if key is None else {key: mean(batch(4))}

        setattr(Model, f"{name}_step", step)
        model = Model()
        model.compile("sgd")
        if name == "predict":
            message = error_of(lambda: model.predict(batch(4), verbose=0))
        else:
            run = model.fit if name == "train" else model.evaluate
            message = error_of(lambda: run(batch(4), verbose=0))
        start = "A result 'loss' of" if key else "A result of"
        assert message.startswith(f"{start} `{name}_step` is not possible with StepOutput")


class TestWhatWorks:
    def test_print_and_text(self, capsys):
        text = "StepOutput(2 microbatches of shape=(), dtype=float32)"
        print(loss(), end="")
        assert capsys.readouterr().out == text
        assert (repr(loss()), str(loss()), f"{loss()}") == (text, text, text)
        assert repr(loss(1)) == "StepOutput(1 microbatch of shape=(), dtype=float32)"

    def test_tf_print_shows_all_microbatches(self, capfd):
        tf.print("loss", loss())
        assert capfd.readouterr().err == "loss StepOutput([0, 1])\n"

    def test_search_in_lists(self):
        one, other = loss(), gradient()
        assert None not in [one, other]
        assert one in [one]
        assert one in {one}
        assert one != "loss"

    def test_tf_nest_and_functions_take_it_apart_and_put_it_together(self):
        twice = tf.nest.map_structure(lambda t: t * 2, loss())
        assert [float(t) for t in twice] == [0.0, 2.0]
        passed = tf.function(lambda given: given)(loss())
        assert isinstance(passed, smp.StepOutput)
        assert float(passed.reduce_mean()) == 0.5

    def test_copies(self):
        with pytest.raises(AttributeError):
            loss().__deepcopy__  # noqa: B018
        assert len(pickle.loads(pickle.dumps(smp.StepOutput([np.ones(2)])))) == 1
