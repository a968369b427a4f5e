"""Programs that change a model between fits or in callbacks."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.registry import READ_EAGERLY, program


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def three_layers():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="one"),
            keras.layers.Dense(8, activation="tanh", name="two"),
            keras.layers.Dense(4, name="three"),
        ]
    )


def fit(model, epochs=2, callbacks=None, **options):
    return model.fit(
        points(24), labels(24), batch_size=12, epochs=epochs, shuffle=False, verbose=0,
        callbacks=callbacks, **options,
    ).history  # fmt: skip


@program("fit")
def freezing_in_phases(wrap):
    """Layers are unfrozen from the top, one in each phase."""
    model = wrap(three_layers())
    found = []
    for first in (2, 1, 0):
        for number, layer in enumerate(model.layers):
            layer.trainable = number >= first
        model.compile(keras.optimizers.Adam(0.02), crossentropy(), metrics=["accuracy"])
        found.append(fit(model, epochs=1))
    return {"found": found, "weights": sums(model)}


@program("fit")
def unfreezing_in_a_callback(wrap):
    """A callback unfreezes a layer and compiles again, in the middle of fit."""

    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.get_layer("one").trainable = True
                self.model.compile(keras.optimizers.SGD(0.1), crossentropy())
                self.model.make_train_function(force=True)

    model = wrap(three_layers())
    model.get_layer("one").trainable = False
    model.compile(keras.optimizers.SGD(0.3), crossentropy())
    history = fit(model, epochs=4, callbacks=[Unfreeze()])
    return {"history": history, "weights": sums(model)}


@program("fit", bound=1e-5, why="Adam divides gradients near zero by their size")
def lora(wrap):
    """LoRA on the layers of a trained model."""
    model = wrap(three_layers())
    model.compile(keras.optimizers.SGD(0.2), crossentropy())
    first = fit(model)
    for name in ("one", "three"):
        model.get_layer(name).enable_lora(2)
    model.get_layer("two").trainable = False
    model.compile(keras.optimizers.Adam(0.02), crossentropy())
    second = fit(model)
    return {
        "first": first,
        "second": second,
        "predictions": model.predict(points(), verbose=0),
        "trained": [tuple(v.shape) for v in model.trainable_variables],
    }


@program("fit")
def lora_by_hand(wrap):
    """Low-rank additions as layers of one's own around trained ones."""

    class Low(keras.layers.Layer):
        def __init__(self, layer, **kwargs):
            super().__init__(**kwargs)
            self.layer = layer
            self.layer.trainable = False
            self.down = keras.layers.Dense(2, use_bias=False)
            self.up = keras.layers.Dense(layer.units, use_bias=False, kernel_initializer="zeros")

        def call(self, x):
            return self.layer(x) + self.up(self.down(x))

    base = wrap(three_layers())
    base.compile(keras.optimizers.SGD(0.2), crossentropy())
    first = fit(base)
    inputs = keras.Input((6,))
    x = inputs
    for layer in base.layers:
        x = Low(layer)(x)
    model = wrap(keras.Model(inputs, x))
    model.compile(keras.optimizers.Adam(0.02), crossentropy())
    second = fit(model)
    return {"first": first, "second": second, "weights": sums(model)}


@program("fit", policy="float32", bound=2e-2, why="float32, rounded to 8 bits")
def quantized(wrap):
    """A model is quantized to 8 bits after fit."""
    model = wrap(three_layers())
    model.compile(keras.optimizers.SGD(0.2), crossentropy())
    history = fit(model)
    before = model.predict(points(), verbose=0)
    model.quantize("int8")
    return {"history": history, "before": before, "after": model.predict(points(), verbose=0)}


@program("fit")
def average_in_the_optimizer(wrap):
    """Evaluation with the optimizer's moving averages, by SwapEMAWeights."""
    model = wrap(three_layers())
    optimizer = keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8)
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    history = fit(
        model, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
        validation_data=(points(12, seed=5), labels(12, seed=6)),
    )  # fmt: skip
    return {"history": history, "weights": sums(model)}


@program("train_step")
def average_by_hand(wrap):
    """Moving averages in the train_step; a callback swaps them in for evaluation."""

    class Averaging(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = three_layers()
            self.average = keras.models.clone_model(self.net)
            self.average.set_weights(self.net.get_weights())
            self.average.trainable = False

        def call(self, x, training=False):
            return self.net(x) if training else self.average(x)

        def train_step(self, data):
            logs = super().train_step(data)
            for mean, weight in zip(self.average.weights, self.net.weights, strict=True):
                mean.assign(0.8 * mean + 0.2 * weight)
            return logs

    model = wrap(Averaging())
    model.compile(keras.optimizers.SGD(0.3), crossentropy())
    history = fit(model, validation_data=(points(12, seed=5), labels(12, seed=6)))
    return {"history": history, "weights": sums(model)}


@program("train_step", refused=READ_EAGERLY)
def swapped_weights(wrap):
    """Evaluation with averaged weights that are swapped with the trained ones and back."""
    return evaluated_with_means(wrap, functools.partial(zip, strict=True))


@program("train_step")
def swapped_local_variables(wrap):
    """Evaluation with averaged weights, swapped in a loop over `smp.local_variables`."""
    return evaluated_with_means(wrap, wrap.local_pairs)


def evaluated_with_means(wrap, pairs):
    """Evaluation with averaged weights.

    Args:
        wrap: Splits models.
        pairs: Takes two lists of variables; gives pairs of them.
    """

    class Averaging(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)

        def build(self, shape):
            self.one.build(shape)
            self.two.build((None, 8))
            self.means = [
                self.add_weight(shape=w.shape, initializer="zeros", trainable=False)
                for w in self.trainable_variables
            ]

        def call(self, x):
            return self.two(self.one(x))

        def train_step(self, data):
            logs = super().train_step(data)
            for mean, weight in zip(self.means, self.trainable_variables, strict=True):
                mean.assign(0.8 * mean + 0.2 * weight)
            return logs

    class Swap(keras.callbacks.Callback):
        def swap(self):
            for mean, weight in pairs(self.model.means, self.model.trainable_variables):
                value = ops.convert_to_tensor(weight)
                weight.assign(mean)
                mean.assign(value)

        def on_test_begin(self, logs=None):
            self.swap()

        def on_test_end(self, logs=None):
            self.swap()

    model = Averaging()
    model.build((None, 6))
    model = wrap(model)
    model.compile(keras.optimizers.SGD(0.3), crossentropy())
    history = fit(
        model, callbacks=[Swap()], validation_data=(points(12, seed=5), labels(12, seed=6))
    )
    return {"history": history, "weights": sums(model)}


@program("train_step")
def curriculum(wrap):
    """A callback lets harder examples in, by a variable of the model."""

    class Curriculum(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)
            self.limit = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            return self.two(self.one(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                errors = keras.losses.sparse_categorical_crossentropy(
                    y, self(x, training=True), from_logits=True
                )
                easy = ops.cast(ops.stop_gradient(errors) < self.limit, errors.dtype)
                loss = ops.sum(easy * errors) / ops.maximum(ops.sum(easy), 1.0)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss, "easy": ops.mean(easy), "limit": self.limit.value}

    class Harder(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.limit.assign(1.2 + 0.3 * epoch)

    model = wrap(Curriculum())
    model.compile(keras.optimizers.SGD(0.3))
    history = fit(model, epochs=4, callbacks=[Harder()])
    return {"history": history, "weights": sums(model)}


@program("fit")
def rates_by_callbacks(wrap):
    """Warm-up by a schedule function, then less after a plateau, and an early end."""
    model = wrap(three_layers())
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    history = fit(
        model, epochs=5, validation_split=0.5,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda e, rate: rate * 2 if e < 2 else rate),
            keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.1, monitor="val_loss"),
            keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
        ],
    )  # fmt: skip
    return {"history": history, "weights": sums(model)}


@program("fit")
def pruning(wrap):
    """The smallest weights are set to zero after each epoch, with get_weights and set_weights."""

    class Prune(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            found = []
            for weight in self.model.get_weights():
                if weight.ndim == 2:
                    weight = weight * (np.abs(weight) > np.quantile(np.abs(weight), 0.3))
                found.append(weight)
            self.model.set_weights(found)

    model = wrap(three_layers())
    model.compile(keras.optimizers.Adam(0.01), crossentropy())
    history = fit(model, callbacks=[Prune()])
    return {"history": history, "weights": sums(model)}


@program("train_step")
def lottery_ticket(wrap):
    """Masks over kernels, which the train_step keeps at zero; back to the first weights."""

    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = three_layers()
            self.masks = [
                self.add_weight(shape=layer.kernel.shape, initializer="ones", trainable=False)
                for layer in self.net.layers
            ]

        def call(self, x):
            return self.net(x)

        def train_step(self, data):
            logs = super().train_step(data)
            for layer, mask in zip(self.net.layers, self.masks, strict=True):
                layer.kernel.assign(layer.kernel * mask)
            return logs

    model = wrap(Masked())
    model.compile(keras.optimizers.SGD(0.3), crossentropy())
    start = model.get_weights()
    first = fit(model)
    after = model.get_weights()
    masks = [(np.abs(w) > np.median(np.abs(w))) * 1.0 for w in after if w.ndim == 2][:3]
    kept = iter(masks * 2)
    model.set_weights([w * next(kept) if w.ndim == 2 else w for w in start])
    second = fit(model)
    return {"first": first, "second": second, "weights": sums(model)}


@program("train_step")
def mixup(wrap):
    """Mixup: rows of the batch are mixed before Keras' own train_step."""

    class Mixup(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)
            self.seeds = keras.random.SeedGenerator(4)

        def call(self, x):
            return self.two(self.one(x))

        def train_step(self, data):
            x, y = data
            y = ops.one_hot(y, 4)
            share = keras.random.uniform((ops.shape(x)[0], 1), seed=self.seeds)
            x = share * x + (1 - share) * ops.flip(x, axis=0)
            y = share * y + (1 - share) * ops.flip(y, axis=0)
            return super().train_step((x, y))

        def test_step(self, data):
            x, y = data
            return super().test_step((x, ops.one_hot(y, 4)))

    model = wrap(Mixup())
    model.compile(
        keras.optimizers.SGD(0.2), keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["categorical_accuracy"],
    )  # fmt: skip
    history = fit(model, validation_split=0.5)
    return {"history": history, "weights": sums(model)}


@program("fit")
def class_weights(wrap):
    """Rare classes count more, with a focal loss and label smoothing on a second head."""
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    model = wrap(keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x)))
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.BinaryFocalCrossentropy(label_smoothing=0.1),
        metrics=[keras.metrics.AUC(), keras.metrics.Precision()],
    )  # fmt: skip
    y = (labels(28) == 0) * 1.0
    history = model.fit(
        points(28), y, class_weight={0: 1.0, 1: 4.0}, batch_size=12, epochs=2, shuffle=False,
        verbose=0,
    ).history  # fmt: skip
    return {"history": [list(h) for h in history.values()], "weights": sums(model)}


@program("smp.step")
def two_models_in_a_step(wrap):
    """Co-training: two models, each taught by what the other one is sure of."""
    models = [wrap(mlp(6, 8, 4)), wrap(mlp(6, 8, 8, 4))]
    optimizers = [keras.optimizers.SGD(0.1) for _ in models]

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape(persistent=True) as tape:
            found = [tf.nn.softmax(model(x, training=True)) for model in models]
            losses = [
                tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, own))
                + tf.reduce_mean((tf.stop_gradient(other) - own) ** 2)
                for own, other in zip(found, found[::-1], strict=True)
            ]
        return [
            tape.gradient(loss, model.trainable_variables)
            for loss, model in zip(losses, models, strict=True)
        ], losses

    @tf.function
    def train(x, y):
        gradients, losses = forward_backward(x, y)
        for each, optimizer, model in zip(gradients, optimizers, models, strict=True):
            means = [wrap.allreduce(gradient.accumulate()) for gradient in each]
            optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return [wrap.allreduce(loss.reduce_mean()) for loss in losses]

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    losses = [[float(loss) for loss in train(x, y)] for _ in range(3)]
    return {"losses": losses, "weights": sums(*models)}
