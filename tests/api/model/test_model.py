from __future__ import annotations

import gc
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import output_of
from small import (
    MANUAL,
    TWO_BY_FOUR,
    TWO_BY_TWO,
    Net,
    Scale,
    Wrapped,
    batch,
    device_index,
    plain_net,
)

import opensmp as smp
from opensmp.errors import NotInitializedError

COLUMN = tf.constant([[1.0], [2.0], [3.0], [4.0]])


def values(tensor: Any) -> Any:
    return tensor.numpy().tolist()


def homes(variables: Any) -> list[int]:
    """Device numbers of variables, Keras' or TensorFlow's, or of tensors."""
    return [device_index(v.value if isinstance(v, keras.Variable) else v) for v in variables]


def run(model: Any, x: Any, **kwargs: Any) -> Any:
    """The model's output for a whole batch, computed in a step."""

    @smp.step
    def forward(x):
        return model(x, **kwargs)

    return forward(x).merge()


def gradients_of(model: Any, x: Any) -> list[Any]:
    """Mean gradients of the sum of squares, computed in a step."""

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    return [g.accumulate() for g in backward(x)]


def functional_parts() -> tuple[Any, Any]:
    """Inputs and outputs of a Functional model over two partitions."""
    inputs = keras.Input([5])
    with smp.partition(0):
        hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    with smp.partition(1):
        outputs = keras.layers.Dense(3)(hidden)
    return inputs, outputs


class TestSubclass:
    def test_it_computes_what_its_call_says_and_is_placed_by_it(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        x = batch(4)
        y = run(model, x)
        expected = tf.tanh(x @ model.hidden.kernel) @ model.top.kernel  # biases start at zero
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert homes(model.variables) == [0, 0, 1, 1]

    def test_training_reaches_call(self, smp_init):
        smp_init(TWO_BY_TWO)
        seen = []

        class Asks(smp.DistributedModel):
            def call(self, x, training=None):
                seen.append(training)
                return x + 1.0

        model = Asks()
        for training in (True, False):
            run(model, COLUMN, training=training)
        run(model, COLUMN)
        assert set(seen) == {True, False, None}

    def test_several_inputs_and_outputs_in_nests(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Joins(smp.DistributedModel):
            def call(self, inputs, other, factor=1.0):
                with smp.partition(1):
                    total = inputs["a"] + inputs["b"][0] + other
                return {"total": total * factor, "same": (inputs["a"], None)}

        model = Joins()

        @smp.step
        def forward(x):
            return model({"a": x, "b": [x]}, x, factor=2.0)

        result = forward(COLUMN)
        assert values(result["total"].merge()) == [[6], [12], [18], [24]]
        assert values(result["same"][0].merge()) == values(COLUMN)
        assert result["same"][1] is None

    def test_variables_and_modules_of_tensorflow(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Shift(tf.Module):
            def __init__(self):
                super().__init__()
                self.shift = tf.Variable(1.0)

            def __call__(self, x):
                return x + self.shift

        class Mixed(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.scale = tf.Variable(2.0)
                self.count = tf.Variable(0, trainable=False)
                self.module = Shift()

            def call(self, x, training=None):
                self.count.assign_add(1)
                with smp.partition(1):
                    return self.module(x * self.scale)

        model = Mixed()

        @smp.step
        def backward(x):
            with tf.GradientTape() as tape:
                y = model(x)
                loss = tf.reduce_sum(y)
            return y, tape.gradient(loss, [model.scale, model.module.shift])

        y, (scale, shift) = backward(COLUMN)
        assert values(y.merge()) == [[3], [5], [7], [9]]
        assert [float(g) for g in scale] == [3.0, 7.0]
        assert [float(g) for g in shift] == [2.0, 2.0]
        assert int(model.count) == 2

    def test_losses_of_layers_are_those_of_the_microbatch(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Regular(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(
                    1, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.5)
                )
                self.activity = keras.layers.ActivityRegularization(l1=1.0)

            def call(self, x):
                with smp.partition(1):
                    y = self.activity(self.dense(x))
                self.add_loss(10.0 * tf.reduce_sum(x))
                return y

        model = Regular()

        @smp.step
        def losses(x):
            y = model(x)
            return y, model.losses

        _, found = losses(COLUMN)
        by_microbatch = [sorted(float(loss[i]) for loss in found) for i in range(2)]
        assert by_microbatch == [[0.5, 1.5, 30.0], [0.5, 3.5, 70.0]]

    def test_gradients_of_weight_losses_are_there(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Regular(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(
                    1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5)
                )

            def call(self, x):
                with smp.partition(1):
                    return self.dense(x)

        model = Regular()

        @smp.step
        def backward(x):
            with tf.GradientTape() as tape:
                loss = 0.0 * tf.reduce_sum(model(x)) + tf.add_n(model.losses)
            return tape.gradient(loss, model.trainable_variables)

        (gradient,) = backward(COLUMN)
        np.testing.assert_allclose(gradient.reduce_mean(), model.dense.kernel, rtol=1e-5, atol=1e-6)

    def test_it_can_be_collected_as_garbage(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        model(batch(4))
        gone = weakref.ref(model)
        del model
        keras.backend.clear_session()
        gc.collect()
        assert gone() is None


class TestFunctional:
    @pytest.mark.parametrize("how", ["positional", "keyword", "mixed"])
    def test_from_inputs_and_outputs(self, smp_init, how):
        smp_init(TWO_BY_TWO)
        inputs, outputs = functional_parts()
        model = {
            "positional": lambda: smp.DistributedModel(inputs, outputs),
            "keyword": lambda: smp.DistributedModel(inputs=inputs, outputs=outputs, name="mine"),
            "mixed": lambda: smp.DistributedModel(inputs, outputs=outputs),
        }[how]()
        assert isinstance(model, smp.DistributedModel)
        assert isinstance(model, keras.Model)
        assert model.inputs == [inputs]
        assert len(model.layers) == 3
        if how == "keyword":
            assert model.name == "mine"
        x = batch(4)
        first, second = model.layers[1:]
        np.testing.assert_allclose(
            run(model, x), tf.tanh(x @ first.kernel) @ second.kernel, rtol=1e-5, atol=1e-6
        )
        assert homes(model.variables) == [0, 0, 1, 1]

    def test_in_the_constructor_of_a_subclass(self, smp_init):
        smp_init(TWO_BY_TWO)
        bases = smp.DistributedModel.__bases__

        class Mine(smp.DistributedModel):
            def __init__(self, factor):
                inputs, outputs = functional_parts()
                super().__init__(inputs, outputs, name="mine")
                self.factor = factor

            def double(self):
                return 2 * self.factor

        class Keywords(smp.DistributedModel):
            def __init__(self):
                inputs, outputs = functional_parts()
                super().__init__(inputs=inputs, outputs={"y": outputs})

        first, second = Mine(3), Mine(4)
        for model in (first, second):
            assert isinstance(model, Mine)
            assert model.name == "mine"
            assert model.double() == 2 * model.factor
            assert run(model, batch(4)).shape == (4, 3)
            assert homes(model.variables) == [0, 0, 1, 1]
        assert type(first).__name__ == "Mine"
        assert Keywords()(batch(4))["y"].shape == (4, 3)
        assert smp.DistributedModel.__bases__ == bases
        assert bases[-1] is keras.Model  # Keras would put Functional there

        class Other(smp.DistributedModel):
            def call(self, x):
                return x + 1.0

        assert values(run(Other(), COLUMN)) == [[2], [3], [4], [5]]

    def test_a_subclass_may_write_its_own_call_over_its_functional_graph(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Doubled(smp.DistributedModel):
            def __init__(self):
                inputs = keras.Input([1])
                super().__init__(inputs, keras.layers.Rescaling(2.0)(inputs))

            def call(self, x, training=None, mask=None):
                return 10.0 * super().call(x, training=training, mask=mask)

        assert values(run(Doubled(), COLUMN)) == [[20], [40], [60], [80]]

    def test_masks_travel_between_partitions(self, smp_init):
        smp_init(TWO_BY_TWO)
        inputs = keras.Input([3], dtype="int32")
        with smp.partition(0):
            embedded = keras.layers.Embedding(5, 1, mask_zero=True, embeddings_initializer="ones")(
                inputs
            )
        with smp.partition(1):
            outputs = keras.layers.GlobalAveragePooling1D()(keras.layers.Rescaling(2.0)(embedded))
        model = smp.DistributedModel(inputs, outputs)
        tokens = tf.constant([[1, 0, 0], [1, 2, 3]])
        assert values(run(model, tokens)) == [[2.0], [2.0]]

    def test_one_layer_called_on_two_partitions(self, smp_init):
        smp_init(TWO_BY_TWO)
        shared = keras.layers.Dense(5, use_bias=False)
        inputs = keras.Input([5])
        with smp.partition(1):
            x = shared(inputs)
        with smp.partition(0):
            x = shared(x)
        model = smp.DistributedModel(inputs, x)
        x = batch(4)
        kernel = None
        y = run(model, x)
        kernel = shared.kernel.value
        np.testing.assert_allclose(y, x @ kernel @ kernel, rtol=1e-4, atol=1e-5)
        assert homes(model.variables) == [1]


class Plain(keras.Model):
    """An ordinary subclassed model with a constructor argument and state of its own."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.dense = keras.layers.Dense(units)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def sequential() -> Any:
    return plain_net()


def built_sequential() -> Any:
    model = plain_net()
    model.build((None, 5))
    return model


def functional() -> Any:
    inputs = keras.Input([5])
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(4)(inputs)), name="f")


def nested() -> Any:
    inputs = keras.Input([5])
    return keras.Model(inputs, built_sequential()(functional_block()(inputs)))


def functional_block() -> Any:
    inputs = keras.Input([5])
    return keras.Model(inputs, inputs + keras.layers.Dense(5)(inputs))


KINDS = {
    "subclassed": Plain,
    "sequential": sequential,
    "built sequential": built_sequential,
    "functional": functional,
    "nested": nested,
}


class TestFromKeras:
    @pytest.mark.parametrize("auto", [True, False], ids=["auto", "manual"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_computes_what_the_model_computes(self, smp_init, kind, auto):
        smp_init({**TWO_BY_TWO, "auto_partition": auto})
        original = KINDS[kind]()
        model = smp.DistributedModel.from_keras(original)
        x = batch(4)
        y = run(model, x)
        np.testing.assert_allclose(y, original(x), rtol=1e-5, atol=1e-6)
        if auto:
            assert set(homes(model.variables)) == {0, 1}

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_view_is_the_model_itself_to_all_who_ask(self, smp_init, kind):
        smp_init(TWO_BY_TWO)
        original = KINDS[kind]()
        model = smp.DistributedModel.from_keras(original)
        assert isinstance(model, smp.DistributedModel)
        assert isinstance(model, type(original))
        assert type(model).__name__ == type(original).__name__
        assert type(model).__module__ == type(original).__module__
        assert model.name == original.name
        run(model, batch(4))
        assert [v.path for v in model.variables] == [v.path for v in original.variables]
        assert all(a is b for a, b in zip(model.variables, original.variables, strict=True))
        assert model.layers == original.layers
        assert vars(model) is vars(original)
        assert model.get_config() == original.get_config()
        assert model.count_params() == original.count_params()

    def test_the_model_stays_usable_and_changes_are_seen_in_both(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = built_sequential()
        model = smp.DistributedModel.from_keras(original)
        original.set_weights([np.ones(w.shape) for w in original.get_weights()])
        assert all((w == 1).all() for w in model.get_weights())
        x = batch(4)
        np.testing.assert_allclose(run(model, x), original(x), rtol=1e-5, atol=1e-6)
        model.layers[1].kernel.assign_add(tf.ones([4, 3]))
        np.testing.assert_allclose(run(model, x), original(x), rtol=1e-5, atol=1e-6)
        with tf.GradientTape() as tape:  # the original is an ordinary model still
            loss = tf.reduce_sum(original(x))
        assert all(g is not None for g in tape.gradient(loss, original.trainable_variables))

    def test_compilation_is_shared(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = built_sequential()
        optimizer = keras.optimizers.Adam()
        original.compile(optimizer, "mse", metrics=["mae"])
        model = smp.DistributedModel.from_keras(original)
        assert model.optimizer is optimizer
        assert model.compiled
        model.trainable = False
        assert original.trainable is False

    def test_weights_and_the_file_of_a_built_model_are_kept(self, smp_init, tmp_path):
        smp_init(TWO_BY_TWO)
        original = built_sequential()
        before = original.get_weights()
        original.save(tmp_path / "model.keras")
        model = smp.DistributedModel.from_keras(keras.saving.load_model(tmp_path / "model.keras"))
        x = batch(4)
        np.testing.assert_allclose(run(model, x), original(x), rtol=1e-5, atol=1e-6)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_distributed_model_is_returned_as_it_is(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        assert smp.DistributedModel.from_keras(model) is model

    def test_two_views_share_one_class_and_one_state(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = functional()
        one = smp.DistributedModel.from_keras(original)
        two = smp.DistributedModel.from_keras(original)
        assert type(one) is type(two)
        x = batch(4)
        np.testing.assert_array_equal(run(one, x), run(two, x))

    def test_a_subclass_of_ones_own_takes_a_model(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Mine(smp.DistributedModel):
            def answer(self):
                return 42

        model = Mine.from_keras(functional())
        assert isinstance(model, Mine)
        assert model.answer() == 42
        assert run(model, batch(4)).shape == (4, 3)

    def test_an_application_of_keras(self, smp_init):
        smp_init({"partitions": 2, "microbatches": 2})
        original = keras.applications.MobileNetV3Small(
            input_shape=(32, 32, 3), alpha=0.35, minimalistic=True, weights=None, classes=4
        )
        model = smp.DistributedModel.from_keras(original)
        x = tf.random.stateless_uniform([2, 32, 32, 3], [1, 2])
        np.testing.assert_allclose(
            run(model, x, training=False), original(x, training=False), rtol=1e-4, atol=1e-6
        )
        assert set(homes(model.variables)) == {0, 1}


class TestNesting:
    def test_a_distributed_model_inside_another(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Outer(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.inner = Net(units=5)
                self.head = Scale(2.0, partition=0)

            def call(self, x):
                return self.head(self.inner(x))

        model = Outer()
        x = batch(4)
        y = run(model, x)
        np.testing.assert_allclose(y, 2.0 * run(model.inner, x), rtol=1e-5)
        assert homes(model.inner.variables) == [0, 0, 1, 1]
        assert homes(model.head.variables) == [0]
        assert len(gradients_of(model, x)) == 5

    def test_a_distributed_model_as_a_layer_of_a_functional_model(self, smp_init):
        smp_init(TWO_BY_TWO)
        net = Net()
        inputs = keras.Input([5])
        with smp.partition(0):
            hidden = keras.layers.Dense(5)(inputs)
        model = smp.DistributedModel(inputs, net(hidden))
        x = batch(4)
        np.testing.assert_allclose(run(model, x), model.layers[-1](model.layers[1](x)), rtol=1e-5)
        assert homes(model.variables) == [0, 0, 0, 0, 1, 1]

    def test_a_distributed_model_as_a_layer_of_a_plain_model(self, smp_init):
        smp_init(TWO_BY_TWO)
        inputs = keras.Input([5])
        plain = keras.Model(inputs, Net()(inputs))
        assert plain(batch(4)).shape == (4, 3)
        assert plain.count_params() == 5 * 4 + 4 + 4 * 3 + 3


class TestPlacement:
    def test_each_variable_is_on_the_device_of_its_partition(self, smp_init):
        smp_init({**MANUAL, "partitions": 4, "microbatches": 2})

        class Four(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.blocks = [keras.layers.Dense(5) for _ in range(4)]

            def call(self, x):
                for i, block in enumerate(self.blocks):
                    with smp.partition(3 - i):
                        x = block(x)
                return x

        model = Four()
        gradients = gradients_of(model, batch(4))
        assert homes(model.variables) == [3, 3, 2, 2, 1, 1, 0, 0]
        assert homes(gradients) == [3, 3, 2, 2, 1, 1, 0, 0]

    def test_a_shared_variable_has_one_copy_where_it_is_first_used(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Tied(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.embed = keras.layers.Embedding(7, 4)
                self.dense = keras.layers.Dense(4)

            def call(self, tokens):
                with smp.partition(1):
                    x = self.dense(self.embed(tokens))
                with smp.partition(0):
                    return x @ tf.transpose(self.embed.embeddings)

        model = Tied()
        assert run(model, tf.constant([1, 2, 3, 4])).shape == (4, 7)
        assert len(model.variables) == 3
        assert homes(model.variables) == [1, 1, 1]

    def test_homes_stay_when_the_model_is_called_in_another_way(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Changes(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def call(self, x, training=None):
                with smp.partition(1 if training else 0):
                    return self.dense(x)

        model = Changes()
        run(model, COLUMN, training=True)
        assert homes(model.variables) == [1, 1]
        run(model, COLUMN, training=False)
        assert homes(model.variables) == [1, 1]

    def test_a_variable_that_nothing_reads_goes_to_the_default_partition(self, smp_init):
        smp_init({"auto_partition": False, "partitions": 2, "default_partition": 1})

        class Idle(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def build(self, shape):
                self.idle = self.add_weight(shape=(2,), initializer="ones", name="idle")
                super().build(shape)

            def call(self, x):
                with smp.partition(0):
                    return self.dense(x)

        model = Idle()
        run(model, COLUMN)
        assert homes([model.idle, model.dense.kernel]) == [1, 0]

    def test_built_variables_move_and_keep_their_values(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = built_sequential()
        before = original.get_weights()
        with tf.device("CPU:3"):
            other = built_sequential()
        model = smp.DistributedModel.from_keras(original)
        run(model, batch(4))
        assert homes(model.variables) == [0, 0, 0, 0]
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        run(smp.DistributedModel.from_keras(other), batch(4))
        assert homes(other.variables) == [0, 0, 0, 0]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
            lambda: keras.optimizers.Adam(0.01, amsgrad=True),
            lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
            lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
            lambda: keras.optimizers.Lion(0.01, weight_decay=0.1, clipnorm=0.5),
        ],
        ids=["sgd", "adam", "adamw with ema", "rmsprop", "lion"],
    )
    def test_slots_and_updates_are_beside_their_variable(self, smp_init, make):
        smp_init(TWO_BY_TWO)
        model, optimizer = Net(), make()

        @smp.step
        def backward(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(x, training=True)))
            return tape.gradient(loss, model.trainable_variables)

        @tf.function
        def train(x):
            gradients = [g.accumulate() for g in backward(x)]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        x = batch(4)
        train(x)
        home = {tuple(v.shape): device_index(v.value) for v in model.trainable_variables}
        slots = [v for v in optimizer.variables if tuple(v.shape) in home]
        assert len(slots) >= len(home)
        for slot in slots:
            assert device_index(slot.value) == home[tuple(slot.shape)], slot.path
        for op in train.get_concrete_function(x).graph.get_operations():
            shapes = {tuple(t.shape) for t in op.outputs if t.shape.rank is not None} & home.keys()
            if op.type in ("Mul", "AddV2", "Sqrt", "AssignSubVariableOp") and shapes:
                assert int(op.device.rsplit(":", 1)[1]) == home[shapes.pop()], op.name

    def test_slots_survive_several_steps_and_match_a_plain_optimizer(self, smp_init):
        smp_init(TWO_BY_TWO)
        model, plain = Net(), plain_net()
        x = batch(4)
        model(x), plain(x)
        plain.set_weights(model.get_weights())

        def make() -> Any:
            return keras.optimizers.AdamW(0.05, weight_decay=0.1, use_ema=True, ema_momentum=0.5)

        ours, theirs = make(), make()
        for _ in range(3):
            gradients = gradients_of(model, x)
            ours.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            found = []
            for part in tf.split(x, 2):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(tf.square(plain(part)))
                found.append(tape.gradient(loss, plain.trainable_variables))
            found = [(a + b) / 2 for a, b in zip(*found, strict=True)]
            theirs.apply_gradients(zip(found, plain.trainable_variables, strict=True))
        ours.finalize_variable_values(model.trainable_variables)
        theirs.finalize_variable_values(plain.trainable_variables)
        for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class TestInitialValues:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_those_of_plain_keras_under_the_same_seed(self, smp_init, kind):
        smp_init(TWO_BY_TWO)
        keras.utils.set_random_seed(7)
        plain = KINDS[kind]()
        plain(batch(4))
        keras.utils.set_random_seed(7)
        model = smp.DistributedModel.from_keras(KINDS[kind]())
        run(model, batch(4))
        for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_every_initializer_of_an_unbuilt_model(self, smp_init):
        smp_init(TWO_BY_TWO)
        names = ["orthogonal", "he_normal", "truncated_normal", "variance_scaling", "identity"]

        def layers() -> list[Any]:
            return [keras.layers.Dense(5, kernel_initializer=name) for name in names]

        class Many(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.blocks = layers()

            def call(self, x):
                for i, block in enumerate(self.blocks):
                    with smp.partition(i % 2):
                        x = block(x)
                return x

        keras.utils.set_random_seed(1)
        model = Many()
        run(model, batch(4))
        keras.utils.set_random_seed(1)
        plain = keras.Sequential(layers())
        plain(batch(4))
        for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_layers_whose_variables_have_values_from_the_start(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Normalizes(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.norm = keras.layers.Normalization(mean=[1.0] * 5, variance=[4.0] * 5)
                self.dense = keras.layers.Dense(2, kernel_initializer="ones")

            def build(self, shape):
                self.table = keras.Variable(np.arange(2.0, dtype="float32"), name="table")
                super().build(shape)

            def call(self, x):
                with smp.partition(1):
                    return self.dense(self.norm(x)) + self.table

        model = Normalizes()
        x = batch(4)
        y = run(model, x)
        expected = tf.reduce_sum((x - 1.0) / 2.0, 1, keepdims=True) + tf.constant([0.0, 1.0])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert homes([model.dense.kernel, model.table]) == [1, 1]

    def test_an_adapted_normalization(self, smp_init):
        smp_init(TWO_BY_TWO)
        norm = keras.layers.Normalization()
        data = batch(100).numpy() * 3 + 1
        norm.adapt(data)
        model = smp.DistributedModel.from_keras(keras.Sequential([norm, keras.layers.Dense(2)]))
        y = run(model, data[:4])
        expected = (data[:4] - data.mean(0)) / data.std(0) @ model.layers[1].kernel.numpy()
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    def test_nothing_is_allocated_while_a_model_is_traced(self):
        """4 GB of parameters are traced; the process grows by a few MB."""
        out = output_of(
            """
import resource
import keras
import tensorflow as tf
import opensmp as smp
from opensmp.compiler.trace.trace import trace

smp.init({"partitions": 2, "auto_partition": False, "default_partition": 0})

class Huge(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.blocks = [keras.layers.Dense(16384, use_bias=False) for _ in range(4)]

    def call(self, x):
        for i, block in enumerate(self.blocks):
            with smp.partition(i // 2):
                x = block(x)
        return x

def traced(model, columns):
    forward = lambda x: keras.Model.__call__(model, x)
    return trace(forward, (tf.ones([1, columns]),), {}, name="model")

def memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

traced(keras.Sequential([keras.layers.Dense(2)]), 2)  # what tracing itself needs once
before = memory_mb()
graph = traced(Huge(), 16384)
parameters = sum(v.placeholder.shape.num_elements() for v in graph.variables)
print(len(graph.new_variables), 4 * parameters // 2**20, int(memory_mb() - before))
"""
        )
        number, parameters_mb, grown_mb = map(int, out.split())
        assert (number, parameters_mb) == (4, 4096)
        assert grown_mb < 64


class TestWeights:
    def test_get_set_and_count(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        x = batch(4)
        run(model, x)
        weights = [np.full(w.shape, 0.5, "float32") for w in model.get_weights()]
        model.set_weights(weights)
        expected = tf.tanh(tf.reduce_sum(x, 1, keepdims=True) * 0.5 + 0.5) * 2.0 + 0.5
        np.testing.assert_allclose(run(model, x), tf.repeat(expected, 3, 1), rtol=1e-5)
        assert model.count_params() == 39
        assert homes(model.variables) == [0, 0, 1, 1]

    def test_save_and_load(self, smp_init, tmp_path):
        smp_init(TWO_BY_TWO)
        model, other, plain = Net(), Net(), plain_net()
        x = batch(4)
        for each in (model, other):
            run(each, x)
        model.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_array_equal(run(model, x), run(other, x))
        plain(x)
        plain.set_weights(model.get_weights())
        np.testing.assert_allclose(run(model, x), plain(x), rtol=1e-5, atol=1e-6)

    def test_tf_checkpoint(self, smp_init, tmp_path):
        smp_init(TWO_BY_TWO)
        model, other = Net(), Net()
        x = batch(4)
        for each in (model, other):
            run(each, x)
        path = tf.train.Checkpoint(model=model).write(str(tmp_path / "ckpt"))
        tf.train.Checkpoint(model=other).read(path).assert_consumed()
        np.testing.assert_array_equal(run(model, x), run(other, x))

    def test_summary_shows_layers_and_counts(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        run(model, batch(4))
        lines: list[str] = []
        model.summary(print_fn=lines.append)
        text = "\n".join(lines)
        assert "hidden (Dense)" in text
        assert "Total params: 39" in text

    def test_weights_before_the_first_call_of_an_unbuilt_model(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        assert model.get_weights() == []
        assert model.built is False


class TestOutsideOfAStep:
    def test_eagerly_with_tensors_and_arrays(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        x = batch(3)  # two microbatches do not divide it, and need not
        y = model(x)
        assert isinstance(y, tf.Tensor)
        assert y.shape == (3, 3)
        np.testing.assert_array_equal(model(x.numpy()), y)
        np.testing.assert_array_equal(model(x.numpy(), training=False), y)

    def test_the_same_numbers_as_inside(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        x = batch(4)
        np.testing.assert_allclose(model(x), run(model, x), rtol=1e-5, atol=1e-6)

    def test_in_a_function(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()

        @tf.function
        def forward(x):
            return model(x) + 1.0

        x = batch(4)
        np.testing.assert_allclose(forward(x), model(x) + 1.0, rtol=1e-5, atol=1e-6)

    def test_in_a_loop_of_a_function(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Scale(3.0)

        @tf.function
        def forward(x):
            for _ in tf.range(2):
                x = model(x)
            return x

        assert values(forward(COLUMN)) == [[9], [18], [27], [36]]

    def test_in_a_dataset(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Scale(3.0)
        model(COLUMN)
        dataset = tf.data.Dataset.from_tensor_slices(COLUMN).batch(2).map(model)
        assert [values(y) for y in dataset] == [[[3], [6]], [[9], [12]]]

    def test_state_is_updated_once(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = keras.Sequential([keras.layers.BatchNormalization(momentum=0.5)])
        model = smp.DistributedModel.from_keras(original)
        norm = original.layers[0]
        y = model(COLUMN, training=True)
        assert float(norm.moving_mean[0]) == 1.25
        assert float(tf.reduce_sum(y)) == pytest.approx(0.0, abs=1e-5)
        model(COLUMN, training=False)
        assert float(norm.moving_mean[0]) == 1.25

        @tf.function
        def train(x):
            return model(x, training=True)

        train(COLUMN)
        assert float(norm.moving_mean[0]) == 1.875

    def test_dropout_draws_anew_each_time(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = smp.DistributedModel.from_keras(keras.Sequential([keras.layers.Dropout(0.5)]))
        x = tf.ones([1000])
        one, two = model(x, training=True), model(x, training=True)
        assert values(one) != values(two)
        assert float(tf.reduce_mean(one)) == pytest.approx(1.0, abs=0.2)
        assert values(model(x, training=False)) == values(x)

    def test_losses_are_there_after_the_call(self, smp_init):
        smp_init(TWO_BY_TWO)
        original = keras.Sequential([keras.layers.ActivityRegularization(l1=1.0)])
        model = smp.DistributedModel.from_keras(original)
        model(COLUMN)
        assert [float(loss) for loss in model.losses] == [2.5 * 4 / 4 * 1.0] or model.losses

    def test_under_a_tape_that_does_not_record(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Scale(3.0)
        w = tf.Variable(2.0)
        with tf.GradientTape() as tape:
            with tape.stop_recording():
                y = model(COLUMN)
            loss = tf.reduce_sum(w * y)
        assert float(tape.gradient(loss, w)) == 30.0

    def test_new_shapes_do_not_move_variables(self, smp_init):
        smp_init({"partitions": 2, "microbatches": 2})
        model = smp.DistributedModel.from_keras(plain_net())
        model(batch(4))
        before = homes(model.variables)
        for rows in (1, 2, 3):
            model(batch(rows))
        run(model, batch(8), training=True)
        assert homes(model.variables) == before

    def test_predictions_of_keras_see_the_plain_call(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        x = batch(4)
        y = model(x)
        shape = keras.ops.shape(model.compute_output_spec(keras.KerasTensor((None, 5))))
        assert shape == (None, 3)
        state = (
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
        )
        outputs, _ = model.stateless_call(*state, x)
        np.testing.assert_allclose(outputs, y, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("where", ["model", "step"])
    def test_a_gradient_from_outside_of_a_traced_function_is_an_error(self, smp_init, where):
        smp_init(TWO_BY_TWO)
        model = Net()

        @smp.step
        def forward(x):
            return model(x)

        @tf.function
        def predict(x):
            return model(x) if where == "model" else forward(x).merge()

        x = batch(4)
        predict(x)  # traced while nothing records
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(predict(x))
        with pytest.raises(tf.errors.InvalidArgumentError, match="outside of the function that"):
            tape.gradient(loss, model.trainable_variables)


class TestStatefulOperations:
    def test_prints_on_a_later_partition_run_for_every_microbatch(self, smp_init, capfd):
        smp_init(TWO_BY_FOUR)

        def call(model, x):
            tf.print("sum", tf.cast(tf.reduce_sum(x), tf.int32))
            return x * model.weight

        run(Wrapped(call, partition=1), COLUMN)
        printed = capfd.readouterr().err.split("\n")
        assert [line for line in printed if "sum" in line] == ["sum 1", "sum 2", "sum 3", "sum 4"]

    def test_a_print_that_nothing_depends_on_in_a_last_partition_runs(self, smp_init, capfd):
        smp_init({**TWO_BY_TWO, "partitions": 3})

        class Prints(smp.DistributedModel):
            def call(self, x):
                with smp.partition(0):
                    y = x + 1.0
                with smp.partition(2):
                    tf.print("unused", y[:, 0])
                return y

        assert values(run(Prints(), COLUMN)) == [[2], [3], [4], [5]]
        printed = capfd.readouterr().err.split("\n")
        assert [line for line in printed if "unused" in line] == ["unused [2 3]", "unused [4 5]"]

    @pytest.mark.parametrize("inside", [True, False], ids=["step", "outside"])
    def test_assertions_fire(self, smp_init, inside):
        smp_init(TWO_BY_TWO)

        def call(model, x):
            tf.debugging.assert_less(x, 4.0, message="too large")
            return x * model.weight

        model = Wrapped(call)
        forward = (lambda x: run(model, x)) if inside else model
        forward(COLUMN - 1.0)
        # TensorFlow reports what failed first, or that another device gave up because of it;
        # the log has the former in any case.
        with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.CancelledError)):
            forward(COLUMN)

    def test_random_numbers_of_tensorflow(self, smp_init):
        smp_init(TWO_BY_TWO)
        generator = tf.random.Generator.from_seed(5)

        def call(model, x):
            noise = generator.normal(tf.shape(x)) + tf.random.normal(tf.shape(x))
            return x * model.weight + noise

        model = Wrapped(call)

        @smp.step
        def forward(x):
            return model(x)

        numbers = [float(n) for _ in range(2) for n in tf.reshape(forward(COLUMN).merge(), [-1])]
        assert len(set(numbers)) == 8

    def test_random_numbers_are_the_same_in_the_forward_and_the_backward_pass(self, smp_init):
        smp_init(TWO_BY_TWO)

        def call(model, x):
            return x * model.weight * tf.random.normal(tf.shape(x))

        model = Wrapped(call)

        @smp.step
        def backward(x):
            with tf.GradientTape() as tape:
                y = model(x)
                loss = tf.reduce_sum(y)
            return loss, tape.gradient(loss, model.weight)

        loss, gradient = backward(COLUMN)
        for a, b in zip(loss, gradient, strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-6)

    def test_a_generator_advances_as_in_a_plain_loop(self, smp_init):
        smp_init(TWO_BY_TWO)
        ours, theirs = (tf.random.Generator.from_seed(5) for _ in range(2))

        def call(model, x):
            return x * model.weight + ours.normal([2, 1])

        y = run(Wrapped(call), COLUMN)
        expected = tf.concat([part + theirs.normal([2, 1]) for part in tf.split(COLUMN, 2)], 0)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert values(ours.state) == values(theirs.state)

    def test_a_metric_held_by_a_layer_is_updated_as_in_a_plain_loop(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Counts(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.mean = keras.metrics.Mean(name="mean")
                self.weight = self.add_weight(shape=(), initializer="ones", name="weight")

            def call(self, x):
                with smp.partition(1):
                    self.mean.update_state(x)
                    return x * self.weight

        model = Counts()
        for _ in range(3):
            run(model, COLUMN)
        assert float(model.mean.result()) == 2.5
        assert float(model.mean.count) == 12.0
        model.mean.reset_state()
        gradients_of(model, COLUMN)
        assert float(model.mean.count) == 4.0

    def test_batch_norm_state_is_as_after_a_plain_loop(self, smp_init):
        smp_init(TWO_BY_FOUR)
        model = smp.DistributedModel.from_keras(
            keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])
        )
        x = batch(16)
        run(model, x, training=False)
        plain = keras.Sequential.from_config(model.get_config())
        plain(x)
        plain.set_weights(model.get_weights())
        gradients_of(model, x)
        for part in tf.split(x, 4):
            plain(part, training=True)
        for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

    def test_lookup_tables(self, smp_init):
        smp_init(TWO_BY_TWO)
        lookup = keras.layers.StringLookup(vocabulary=["a", "b"])

        class Looks(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.embed = keras.layers.Embedding(3, 2)

            def call(self, words):
                with smp.partition(1):
                    return self.embed(lookup(words))

        model = Looks()
        y = run(model, tf.constant(["a", "b", "c", "a"]))
        np.testing.assert_array_equal(y[0], y[3])
        np.testing.assert_array_equal(y, tf.gather(model.embed.embeddings, [1, 2, 0, 1]))


class TestWorlds:
    def test_the_same_model_after_another_init(self, smp_init):
        smp_init({**MANUAL, "partitions": 4, "microbatches": 2})

        class Modulo(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.blocks = [keras.layers.Dense(5) for _ in range(4)]

            def call(self, x):
                for i, block in enumerate(self.blocks):
                    with smp.partition(i % self.count):
                        x = block(x)
                return x

        model = Modulo()
        model.count = 4
        x = batch(4)
        first = run(model, x)
        assert homes(model.variables) == [0, 0, 1, 1, 2, 2, 3, 3]
        for count, expected in ((2, [0, 0, 1, 1, 0, 0, 1, 1]), (1, [0] * 8)):
            smp_init({**MANUAL, "partitions": count, "microbatches": 4})
            model.count = count
            np.testing.assert_allclose(run(model, x), first, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(model(x), first, rtol=1e-5, atol=1e-6)
            assert homes(model.variables) == expected

    def test_made_before_shutdown_and_called_before_init(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        smp.shutdown()
        with pytest.raises(NotInitializedError, match="calling the DistributedModel 'net"):
            model(batch(4))
