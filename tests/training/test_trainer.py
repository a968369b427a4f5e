"""`fit`, `evaluate` and `predict` give the numbers of plain Keras."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from training.fixtures import BY_TWO, assert_close, assert_same, both, classifier, data

import opensmp as smp
from opensmp.errors import StepError


@pytest.fixture(autouse=True)
def _two_partitions(smp_init):
    smp_init(BY_TWO)


def compiled(make=classifier, **options):
    def build():
        model = make()
        model.compile(**{"optimizer": "adam", "loss": "sparse_categorical_crossentropy", **options})
        return model

    return build


def fitted(*args, **kwargs):
    kwargs = {"epochs": 2, "verbose": 0, **kwargs}
    return lambda model: model.fit(*args, **kwargs).history


def test_fit_with_a_last_batch_that_microbatches_do_not_divide():
    x, y = data(22)
    weights = np.random.default_rng(3).uniform(size=22).astype("float32")

    def use(model):
        history = fitted(x, y, batch_size=8, sample_weight=weights, validation_data=(x[:7], y[:7]))
        return history(model), model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)

    assert_same(
        compiled(metrics=["accuracy"], weighted_metrics=["accuracy"]),
        use,
    )


def test_one_more_trace_for_a_last_batch_and_none_per_epoch():
    x, y = data(22)
    model = smp.DistributedModel.from_keras(compiled()())
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    before = model.train_function.tracing_count
    model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    assert model.train_function.tracing_count == before <= 3
    assert {rows for rows, _ in model.train_function._functions} == {8, 6}


def test_batch_smaller_than_the_number_of_microbatches():
    x, y = data(5)
    assert_same(compiled(), fitted(x, y, batch_size=3))


def test_text_inside_of_the_model_whose_outputs_have_no_known_size():
    words = np.array(["one two three", "two four", "three", "one one four"])
    _, y = data(22)

    def make():
        text = keras.layers.TextVectorization(output_sequence_length=4)
        text.adapt(words)
        keras.utils.set_random_seed(1)
        layers = [
            keras.Input((), dtype="string"),
            text,
            keras.layers.Embedding(8, 6, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(4, activation="softmax"),
        ]
        return keras.Sequential(layers)

    assert_same(
        compiled(make, metrics=["accuracy"]),
        fitted(tf.constant(words[y]), y, batch_size=8, epochs=1, shuffle=False),
    )


def test_data_that_run_out_are_no_step_of_the_optimizer():
    """Plain Keras counts one more per epoch: it counts before it asks for the next batch."""
    x, y = data(10)

    def rows():
        for first in (0, 5):
            yield x[first : first + 5], y[first : first + 5]

    signature = (tf.TensorSpec((None, 6)), tf.TensorSpec((None,), tf.int64))
    unknown = tf.data.Dataset.from_generator(rows, output_signature=signature)
    model = smp.DistributedModel.from_keras(compiled()())
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(unknown, epochs=2, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 4


def test_on_batch():
    x, y = data(10)

    def use(model):
        return (
            model.train_on_batch(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0}),
            model.train_on_batch(x, y, sample_weight=np.arange(10.0), return_dict=True),
            model.test_on_batch(x, y),
            model.predict_on_batch(x),
        )

    assert_same(compiled(metrics=["accuracy"]), use)


@pytest.mark.parametrize("kind", ["dataset", "generator", "py_dataset", "tensors"])
def test_kinds_of_data(kind):
    x, y = data(22)

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[i * 8 : i * 8 + 8], y[i * 8 : i * 8 + 8]

    def batches():
        while True:
            for i in range(3):
                yield x[i * 8 : i * 8 + 8], y[i * 8 : i * 8 + 8]

    def use(model):
        if kind == "dataset":
            given = (tf.data.Dataset.from_tensor_slices((x, y)).batch(8),)
        elif kind == "generator":
            return model.fit(batches(), steps_per_epoch=3, epochs=2, verbose=0).history
        elif kind == "py_dataset":
            given = (Data(),)
        else:
            given = (tf.constant(x), tf.constant(y))
        return model.fit(*given, epochs=2, verbose=0, shuffle=False).history

    assert_same(compiled(), use)


def test_regularisers_and_activity():
    x, y = data(22)
    assert_same(
        compiled(lambda: classifier(kernel_regularizer="l2", activity_regularizer="l1")),
        fitted(x, y, batch_size=8, validation_split=0.3),
    )


def test_mask_of_the_output_and_of_a_recurrent_layer():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (10, 7))
    y = rng.integers(0, 3, (10, 7))

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((7,), dtype="int32")
        hidden = keras.layers.Embedding(5, 4, mask_zero=True)(inputs)
        hidden = keras.layers.LSTM(4, return_sequences=True)(hidden)
        return keras.Model(inputs, keras.layers.Dense(3)(hidden))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert_same(compiled(make, loss=loss, weighted_metrics=["accuracy"]), fitted(x, y))


def test_several_outputs_losses_and_weights():
    x, y = data(22)

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,), name="numbers")
        hidden = keras.layers.Dense(8, activation="tanh")(inputs)
        one = keras.layers.Dense(4, activation="softmax", name="one")(hidden)
        two = keras.layers.Dense(1, name="two")(hidden)
        return keras.Model(inputs, {"one": one, "two": two})

    targets = {"one": y, "two": x[:, :1]}
    assert_same(
        compiled(
            make,
            loss={"one": "sparse_categorical_crossentropy", "two": "huber"},
            loss_weights={"one": 1.0, "two": 0.3},
            metrics={"one": ["accuracy"], "two": ["mae"]},
        ),
        fitted({"numbers": x}, targets, batch_size=8),
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight"])
def test_reductions_of_losses(reduction):
    x, y = data(10)
    loss = keras.losses.SparseCategoricalCrossentropy(reduction=reduction)
    weights = np.arange(10.0)
    assert_same(compiled(loss=loss), fitted(x, y, sample_weight=weights))


def test_loss_over_the_whole_batch():
    x, y = data(10)

    def loss(y, p):  # couples all examples
        return keras.ops.max(keras.ops.std(p, axis=0)) + keras.ops.mean(p[:, 0])

    assert_same(compiled(loss=loss), fitted(x, y))


class Custom(keras.Model):
    """Own steps, own loss, own metric."""

    def __init__(self, part):
        super().__init__()
        keras.utils.set_random_seed(1)
        self.part = part
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.top = keras.layers.Dense(4, activation="softmax")
        self.seen = keras.metrics.Sum(name="seen")

    def call(self, x):
        x = self.hidden(x)
        if self.part == "add_loss":
            self.add_loss(0.1 * keras.ops.mean(x**2))
            self.add_loss(keras.ops.sum(x**2, axis=-1))  # a number per example
        return self.top(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        if self.part == "compute_loss":
            loss = loss + keras.ops.logsumexp(y_pred)
        return loss

    def train_step(self, data):
        if self.part not in ("train_step", "all"):
            return super().train_step(data)
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x)
            loss = keras.ops.mean(keras.ops.square(y_pred - keras.ops.one_hot(y, 4)))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.seen.update_state(tf.ones_like(y))
        return {"loss": loss, "seen": self.seen.result()}

    def test_step(self, data):
        if self.part != "all":
            return super().test_step(data)
        x, _ = data
        return {"entropy": -keras.ops.mean(keras.ops.log(self(x)))}

    def predict_step(self, data):
        result = super().predict_step(data)
        return result * 2 if self.part == "all" else result


@pytest.mark.parametrize("part", ["", "add_loss", "compute_loss", "train_step", "all"])
def test_steps_and_losses_of_a_subclass(part):
    x, y = data(22)

    def use(model):
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
        scores = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
        return history, scores, model.predict(x, batch_size=8, verbose=0)

    assert_same(compiled(lambda: Custom(part)), use)


def test_train_step_with_a_step_of_its_own():
    x, y = data(16)
    loss_of = keras.losses.SparseCategoricalCrossentropy()

    class Own(smp.DistributedModel):
        def __init__(self):
            super().__init__()
            keras.utils.set_random_seed(1)
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.top = keras.layers.Dense(4, activation="softmax")

        def call(self, x):
            return self.top(self.hidden(x))

        @smp.step
        def forward_backward(self, x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(y, self(x))
            return tape.gradient(loss, self.trainable_variables), loss

        def train_step(self, data):
            gradients, loss = self.forward_backward(*data)
            gradients = [g.accumulate() for g in gradients]
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss.reduce_mean()}

    class Plain(keras.Model):
        call = Own.call

        def __init__(self):
            super().__init__()
            keras.utils.set_random_seed(1)
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.top = keras.layers.Dense(4, activation="softmax")

    results = []
    for model in (Plain(), Own()):
        model.compile("adam", loss_of)
        keras.utils.set_random_seed(2)
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
        results.append(
            (history["loss"][0] if isinstance(model, Plain) else None, model.get_weights())
        )
    assert_close(results[0][1], results[1][1])


def test_dropout_is_the_same_in_the_forward_and_the_backward_pass():
    """The gradient is that of the loss which was computed: nothing flows where units dropped."""

    class Dropping(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(shape=(64,), initializer="ones", name="scale")
            self.drop = keras.layers.Dropout(0.5, seed=1)

        def call(self, x, training=None):
            return self.drop(x * self.scale, training=training)

        def train_step(self, data):
            x, _ = data
            with tf.GradientTape() as tape:
                y = self(x, training=True)
                loss = keras.ops.sum(y)
            (gradient,) = tape.gradient(loss, self.trainable_variables)
            difference = keras.ops.max(keras.ops.abs(gradient - keras.ops.sum(y, axis=0)))
            return {"difference": difference, "sum": loss}

    model = smp.DistributedModel.from_keras(Dropping())
    model.compile("sgd")
    x = np.ones((8, 64), "float32")
    history = model.fit(x, x, batch_size=8, epochs=3, verbose=0).history
    assert history["difference"] == [0.0] * 3
    assert len(set(history["sum"])) == 3  # and new ones each time


def test_run_eagerly_runs_the_layers_one_after_the_other():
    x, y = data(22)
    seen = []

    class Looking(Custom):
        def call(self, x):
            seen.append(type(x).__name__)
            return super().call(x)

    assert_same(
        compiled(lambda: Looking("add_loss"), run_eagerly=True, metrics=["accuracy"]),
        fitted(x, y, batch_size=8),
    )
    assert set(seen) == {"EagerTensor"}


@pytest.mark.parametrize("steps", [2, 5])
def test_steps_per_execution(steps):
    x, y = data(22)

    def use(model):
        seen = []
        see = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(b))
        history = model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[see]).history
        return history, seen, model.predict(x, batch_size=4, verbose=0)

    assert_same(compiled(steps_per_execution=steps), use)


def test_jit_compile_is_left_out_with_a_word():
    model = smp.DistributedModel.from_keras(classifier())
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    assert model.jit_compile is False
    x, y = data(8)
    model.fit(x, y, verbose=0)


def test_freezing_between_fits():
    x, y = data(16)

    def use(model):
        histories = []
        for frozen in (False, True, False):
            model.get_layer("hidden").trainable = not frozen
            model.compile("adam", "sparse_categorical_crossentropy")
            histories.append(model.fit(x, y, batch_size=8, verbose=0).history)
            histories.append(model.get_layer("hidden").kernel.numpy())
        return histories

    assert_same(classifier, use)


def test_a_tensor_that_is_no_batch_is_refused():
    def batches():
        while True:
            yield (np.ones((8, 6), "float32"), np.ones((3, 6), "float32")), np.ones(8)

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.top = keras.layers.Dense(1)

        def call(self, inputs):
            return self.top(inputs[0]) + keras.ops.mean(inputs[1])

    model = smp.DistributedModel.from_keras(Two())
    model.compile("sgd", "mse")
    with pytest.raises(StepError, match=r"a tensor of shape \(3, 6\)"):
        model.fit(batches(), steps_per_epoch=1, verbose=0)


def test_plain_and_distributed_twin_share_what_they_learn():
    x, y = data(16)
    plain = compiled()()
    twin = smp.DistributedModel.from_keras(plain)
    twin.fit(x, y, batch_size=8, verbose=0)
    assert_close(twin.predict(x, verbose=0), plain.predict(x, verbose=0))
    plain.fit(x, y, batch_size=8, verbose=0)
    twin.fit(x, y, batch_size=8, verbose=0)
    assert_close(twin.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0))


def test_both_gives_two_models():
    plain, ours = both(classifier, lambda model: isinstance(model, smp.DistributedModel))
    assert (plain, ours) == (False, True)


@pytest.mark.parametrize("where", ["made", "used"])
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_a_tf_distribute_strategy_is_refused(how, where):
    x, y = data(8)
    scope, nothing = tf.distribute.OneDeviceStrategy("CPU:0").scope(), contextlib.nullcontext()
    with scope if where == "made" else nothing:
        model = smp.DistributedModel.from_keras(compiled()())
    use = scope if where == "used" else nothing
    with pytest.raises(StepError, match=r"scope of a OneDeviceStrategy.*opensmp run"), use:
        getattr(model, how)(x, y)


def test_sparse_batches_of_a_model_that_is_built_by_them():
    x, y = data(16)
    x = np.where(x > 0.5, x, 0.0)

    def batches():
        for i in (0, 8):
            yield tf.sparse.from_dense(tf.constant(x[i : i + 8])), y[i : i + 8]

    def make():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [keras.layers.Dense(8), keras.layers.Dense(4, activation="softmax")]
        )

    def use(model):
        history = model.fit(batches(), verbose=0).history
        return history, model.predict((b for b in batches()), verbose=0)

    plain, ours = both(compiled(make), use)
    assert_close(plain, ours)
