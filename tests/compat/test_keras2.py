from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import output_of

import opensmp as smp
from opensmp.compat import keras2

OPTIMIZERS = [
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.AdamW,
]


@pytest.fixture(autouse=True)
def _installed():
    keras2.install()


def small_model() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([np.arange(6.0).reshape(3, 2), np.zeros(2)])
    return model


# ---------------------------------------------------------------------------- get_gradients


def test_get_gradients_are_those_of_the_tape():
    model = small_model()
    optimizer = keras.optimizers.SGD(0.1)
    x = tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    @tf.function
    def symbolic(x):
        loss = tf.reduce_mean(model(x) ** 2)
        return optimizer.get_gradients(loss, model.trainable_variables)

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    expected = tape.gradient(loss, model.trainable_variables)
    for received, wanted in zip(symbolic(x), expected, strict=True):
        np.testing.assert_array_equal(received, wanted)


def test_get_gradients_takes_tensors_tf_variables_and_nested_lists():
    optimizer = keras.optimizers.SGD(0.1)
    variable = tf.Variable(3.0)
    keras_variable = keras.Variable(5.0)

    @tf.function
    def symbolic(x):
        loss = x * variable * keras_variable
        return optimizer.get_gradients(loss, [x, [variable, keras_variable]])

    assert [float(grad) for grad in symbolic(tf.constant(2.0))] == [15.0, 10.0, 6.0]


def test_get_gradients_of_an_unconnected_variable_is_none():
    optimizer = keras.optimizers.SGD(0.1)
    used, unused = keras.Variable(2.0), keras.Variable(3.0)
    kinds = []

    @tf.function
    def symbolic():
        grads = optimizer.get_gradients(used.value**2, [used, unused])
        kinds.extend(grad is None for grad in grads)
        return grads[0]

    assert float(symbolic()) == 4.0
    assert kinds == [False, True]


def test_get_gradients_eagerly_is_an_error_that_shows_the_way():
    with pytest.raises(RuntimeError, match=r"eager execution is enabled(.|\n)*@smp\.step"):
        keras.optimizers.SGD(0.1).get_gradients(tf.constant(1.0), [])


SCALING = [
    lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0),
    lambda: keras.optimizers.SGD(0.1, loss_scale_factor=64.0),
]


@pytest.mark.parametrize("scaling", SCALING)
@pytest.mark.parametrize("way", ["get_gradients", "compute_gradients", "tape"])
def test_gradients_with_a_loss_scale_are_those_that_apply_gradients_takes(scaling, way):
    x = tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def trained(optimizer):
        model = small_model()
        optimizer.build(model.trainable_variables)

        @tf.function
        def train():
            variables = model.trainable_variables
            if way == "tape":
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(model(x) ** 2)
                pairs = optimizer.compute_gradients(loss, variables, tape=tape)
                gradients = [gradient for gradient, _ in pairs]
            else:
                loss = tf.reduce_mean(model(x) ** 2)
                gradients = getattr(optimizer, way)(loss, variables)
                if way == "compute_gradients":
                    gradients = [gradient for gradient, _ in gradients]
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        for _ in range(11):
            train()
        return model.get_weights()

    for received, expected in zip(
        trained(scaling()), trained(keras.optimizers.SGD(0.1)), strict=True
    ):
        np.testing.assert_allclose(received, expected, rtol=1e-6)


# ------------------------------------------------------------------------ compute_gradients


def gradients_of_the_tape(model: keras.Model, x: tf.Tensor) -> list[tf.Tensor]:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    return tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize("listed", [True, False])
def test_compute_gradients_of_a_function_are_pairs_for_apply_gradients(listed):
    model, optimizer = small_model(), keras.optimizers.SGD(0.1)
    x = tf.constant([[1.0, 2.0, 3.0]])
    variables = model.trainable_variables
    pairs = optimizer.compute_gradients(
        lambda: tf.reduce_mean(model(x) ** 2), variables if listed else lambda: variables
    )
    for (received, variable), expected, own in zip(
        pairs, gradients_of_the_tape(model, x), variables, strict=True
    ):
        assert variable is own
        np.testing.assert_array_equal(received, expected)
    optimizer.apply_gradients(pairs)
    assert int(optimizer.iterations) == 1


def test_compute_gradients_of_a_tensor_needs_its_tape_in_eager_code():
    model, optimizer = small_model(), keras.optimizers.SGD(0.1)
    x = tf.constant([[1.0, 2.0, 3.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    with pytest.raises(ValueError, match=r"a loss that is a tensor needs tape=.*without a tape"):
        optimizer.compute_gradients(loss, model.trainable_variables)
    pairs = optimizer.compute_gradients(loss, model.trainable_variables, tape=tape)
    for (received, _), expected in zip(pairs, gradients_of_the_tape(model, x), strict=True):
        np.testing.assert_array_equal(received, expected)


def test_compute_gradients_with_respect_to_a_tensor():
    x = tf.constant(3.0)
    [(gradient, of)] = keras.optimizers.SGD(0.1).compute_gradients(lambda: x**2, [x])
    assert float(gradient) == 6.0
    assert of is x


@pytest.mark.parametrize("with_tape", [False, True])
def test_compute_gradients_in_a_step_are_those_of_the_plain_model(smp_init, with_tape):
    smp_init({"partitions": 2, "microbatches": 2})
    plain = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
    )
    model = smp.DistributedModel.from_keras(plain)
    optimizer = keras.optimizers.SGD(0.1)
    x = tf.constant(np.arange(12.0).reshape(4, 3) / 12, tf.float32)

    @smp.step
    def step(x):
        if with_tape:
            pairs = optimizer.compute_gradients(
                lambda: tf.reduce_mean(model(x) ** 2), model.trainable_variables
            )
        else:
            loss = tf.reduce_mean(model(x) ** 2)
            pairs = optimizer.compute_gradients(loss, model.trainable_variables)
        return [gradient for gradient, _ in pairs]

    received = [gradient.accumulate() for gradient in step(x)]
    parts = [gradients_of_the_tape(plain, part) for part in tf.split(x, 2)]
    for mean, first, second in zip(received, *parts, strict=True):
        np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------- lr and decay


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lr_is_accepted_as_learning_rate(optimizer):
    made = optimizer(lr=0.25)
    assert float(made.learning_rate) == float(made.lr) == 0.25


def test_lr_wins_over_learning_rate_and_may_be_an_integer():
    assert float(keras.optimizers.SGD(0.5, lr=1).learning_rate) == 1.0
    assert float(keras.optimizers.SGD(learning_rate=0.5, lr=0.25).learning_rate) == 0.25


def test_lr_can_be_set():
    optimizer = keras.optimizers.Adam(0.5)
    optimizer.lr = 0.25
    assert float(optimizer.learning_rate) == 0.25
    optimizer.lr.assign(0.125)
    assert float(optimizer.learning_rate) == 0.125


def test_lr_of_a_loss_scale_optimizer_is_that_of_the_inner_one():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    optimizer.lr = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25


def test_lr_may_be_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    assert float(keras.optimizers.SGD(lr=schedule).lr) == 0.5


@pytest.mark.parametrize("arguments", [{"lr": 0.5}, {"learning_rate": 0.5}])
def test_decay_divides_by_one_plus_decay_times_iterations(arguments):
    optimizer = keras.optimizers.SGD(decay=0.25, **arguments)
    variable = keras.Variable(10.0)
    values = []
    for _ in range(4):
        optimizer.apply_gradients([(tf.constant(1.0), variable)])
        values.append(float(variable.value))
    expected = 10.0 - np.cumsum([0.5 / (1 + 0.25 * step) for step in range(4)])
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_keeps_the_default_rate_of_the_optimizer(optimizer):
    assert float(optimizer(decay=0.5).lr) == float(optimizer().lr)


@pytest.mark.parametrize("decay", [0, 0.0, None])
def test_no_decay_leaves_the_rate_settable(decay):
    optimizer = keras.optimizers.SGD(0.5, decay=decay)
    optimizer.lr = 0.25
    assert float(optimizer.lr) == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -0.1}, r"decay must be a number >= 0\. Received: decay=-0\.1"),
        ({"decay": "fast"}, r"decay must be a number >= 0\. Received: decay='fast'"),
        (
            {"decay": 0.1, "lr": keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)},
            "takes one schedule only",
        ),
    ],
)
def test_decay_that_is_not_possible_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras.optimizers.SGD(**arguments)


def test_unknown_arguments_are_still_refused():
    with pytest.raises(ValueError, match="momentun"):
        keras.optimizers.SGD(lr=0.5, momentun=0.9)


def test_optimizer_with_decay_is_saved_and_loaded():
    optimizer = keras.optimizers.Adam(lr=0.5, decay=0.25)
    loaded = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert float(loaded.learning_rate) == 0.5
    assert loaded.get_config() == optimizer.get_config()


# ------------------------------------------------------------------------------- variables


def built(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    optimizer.build(small_model().trainable_variables)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.5, momentum=0.9),
        lambda: keras.optimizers.Adam(0.5),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.5)),
    ],
    ids=["SGD", "Adam", "LossScaleOptimizer"],
)
def test_variables_are_a_list_and_can_be_called(make):
    optimizer = built(make())
    as_list, called = optimizer.variables, optimizer.variables()
    assert isinstance(as_list, list)
    assert type(called) is list
    assert [id(variable) for variable in as_list] == [id(variable) for variable in called]
    assert len(as_list) == len(called) > 2
    assert as_list[0] is optimizer.variables[0]


def test_variables_of_an_inner_optimizer_are_there_once():
    optimizer = built(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.5)))
    names = [id(variable) for variable in optimizer.variables()]
    assert len(set(names)) == len(names)
    assert {id(variable) for variable in optimizer.inner_optimizer.variables} < set(names)


def test_trained_model_is_saved_and_loaded_with_its_optimizer(tmp_path: Path):
    model = small_model()
    model.compile(keras.optimizers.Adam(lr=0.5, decay=0.25), "mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == 4
    for received, wanted in zip(
        loaded.optimizer.get_weights(), model.optimizer.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(received, wanted)


def test_checkpoint_restores_the_optimizer(tmp_path: Path):
    model, other = small_model(), small_model()
    first, second = keras.optimizers.Adam(0.5), keras.optimizers.Adam(0.5)
    for optimizer, owner in ((first, model), (second, other)):
        optimizer.build(owner.trainable_variables)
    grads = [tf.ones(variable.shape) for variable in model.trainable_variables]
    first.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    path = tf.train.Checkpoint(model=model, optimizer=first).write(str(tmp_path / "ckpt"))
    tf.train.Checkpoint(model=other, optimizer=second).read(path).assert_consumed()
    for received, wanted in zip(second.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(received, wanted)


# --------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.5),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.5)),
    ],
    ids=["Adam", "LossScaleOptimizer"],
)
def test_weights_go_round(make):
    source, target = built(make()), built(make())
    wanted = [np.full_like(array, number) for number, array in enumerate(source.get_weights(), 1)]
    source.set_weights(wanted)
    target.set_weights(source.get_weights())
    for received, array in zip(target.get_weights(), wanted, strict=True):
        np.testing.assert_array_equal(received, array)


def test_weights_that_do_not_fit_are_all_named_and_none_is_taken():
    optimizer = built(keras.optimizers.SGD(0.5, momentum=0.9))
    before = optimizer.get_weights()
    with pytest.raises(ValueError, match=r"expected 4 arrays, received 3; array 2(.|\n)*\(7,\)"):
        optimizer.set_weights([np.int64(5), np.float32(0.1), np.zeros(7)])
    for received, array in zip(optimizer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(received, array)


def test_weights_before_build_are_refused():
    with pytest.raises(ValueError, match=r"Call optimizer\.build"):
        keras.optimizers.SGD(0.5).set_weights([])


# ------------------------------------------------------------------------ metrics and models


@pytest.mark.parametrize(
    "metric", [keras.metrics.Mean(), keras.metrics.Sum(), keras.metrics.MeanMetricWrapper(abs)]
)
def test_reset_states_resets_the_state(metric):
    for variable in metric.variables:
        variable.assign(3.0)
    metric.reset_states()
    assert [float(variable.value) for variable in metric.variables] == [0.0] * len(metric.variables)


def test_reset_states_calls_the_reset_state_of_a_subclass():
    class Counted(keras.metrics.Mean):
        resets = 0

        def reset_state(self):
            self.resets += 1
            super().reset_state()

    metric = Counted()
    metric.resets = 0
    metric.reset_states()
    assert metric.resets == 1


def test_reset_states_of_a_model_clears_stateful_layers_in_nested_models_too():
    inner = keras.Sequential([keras.layers.GRU(2, stateful=True, return_sequences=True)])
    model = keras.Sequential([inner, keras.layers.LSTM(2, stateful=True), keras.layers.Dense(1)])
    x = np.ones((2, 3, 4), "float32")
    first = model(x).numpy()
    assert not np.array_equal(model(x), first)
    model.reset_states()
    np.testing.assert_array_equal(model(x), first)


# ------------------------------------------------------------------------------ installation


def test_installing_again_changes_nothing():
    before = [
        keras.optimizers.Optimizer.__init__,
        keras.optimizers.LossScaleOptimizer.variables,
        keras.metrics.Metric.reset_states,
    ]
    keras2.install()
    after = [
        keras.optimizers.Optimizer.__init__,
        keras.optimizers.LossScaleOptimizer.variables,
        keras.metrics.Metric.reset_states,
    ]
    assert all(one is other for one, other in zip(before, after, strict=True))


PROBE = """
def probe():
    import keras, warnings
    optimizer = keras.optimizers.SGD(0.5)
    found = [hasattr(optimizer, "get_gradients"), hasattr(optimizer, "lr"),
             hasattr(optimizer, "get_weights"), callable(optimizer.variables),
             hasattr(keras.metrics.Mean(), "reset_states"), hasattr(keras.Model(), "reset_states")]
    try:
        keras.optimizers.SGD(lr=0.5)
        found.append(True)
    except ValueError:
        found.append(False)
    return found
"""


def test_importing_opensmp_or_smp_changes_nothing_and_the_old_path_everything():
    out = output_of(
        PROBE
        + """
import opensmp, opensmp.compat.keras2, smp
print(set(probe()))
import smdistributed.modelparallel.tensorflow
print(set(probe()))
"""
    )
    assert out.split("\n") == ["{False}", "{True}"]
