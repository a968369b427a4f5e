"""Models whose steps call their parts, as people write them, and what a training of each gives.

Each function of `PROGRAMS` takes what makes a distributed model of a plain one, or nothing, trains,
and returns its numbers by name.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

ROWS = 16


def data(width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, width)).astype("float32")


def mlp(width, out, name, **kwargs):
    return keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dense(8, activation="tanh", **kwargs),
            keras.layers.Dense(out),
        ],
        name=name,
    )


def block(width, out, name):
    inputs = keras.Input((width,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(out)(x + 0.1), name=name)


def noise(shape, number):
    return tf.random.stateless_normal(shape, [number, 7])


class Vae(keras.Model):
    """Its call is decoder(encoder(x)), its steps call both by themselves."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        penalty = keras.regularizers.L2(0.1)
        self.encoder = mlp(
            6, 4, "encoder", kernel_regularizer=penalty, activity_regularizer=penalty
        )
        self.decoder = block(2, 6, "decoder")
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, x):
        return self.decoder(self.encoder(x)[:, :2])

    def loss_of(self, x):
        z = self.encoder(x, training=True)
        mean, log = z[:, :2], z[:, 2:]
        out = self.decoder(mean + tf.exp(0.5 * log) * noise([ROWS, 2], 1), training=True)
        kl = -0.5 * tf.reduce_mean(1 + log - tf.square(mean) - tf.exp(log))
        return tf.reduce_mean(tf.square(out - x)) + kl + sum(self.losses) + sum(self.encoder.losses)

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss_of(x)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, x):
        self.loss_tracker.update_state(tf.reduce_mean(tf.square(self(x) - x)))
        return {"loss": self.loss_tracker.result()}


def vae(wrap, before="fit"):
    """A variational autoencoder; `before` names what comes first."""
    keras.utils.set_random_seed(1)
    model = wrap(Vae())
    model.compile(keras.optimizers.Adam(0.01))
    x, found = data(), {}
    for number, call in enumerate([before, "fit", "evaluate", "predict", "fit", "evaluate"]):
        options = {"batch_size": ROWS, "verbose": 0}
        if call == "fit":
            history = model.fit(x, epochs=2, shuffle=False, **options).history
            found[f"{number} fit"] = history["loss"]
        else:
            found[f"{number} {call}"] = getattr(model, call)(x, **options)
    found["decoded"] = model.decoder.predict(data(2), batch_size=ROWS, verbose=0)
    return {**found, "weights": model.get_weights()}


class Gan(keras.Model):
    """Two models and two optimizers, trained in turn; no call of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.discriminator, self.generator = mlp(6, 1, "discriminator"), block(3, 6, "generator")
        self.d_metric = keras.metrics.Mean(name="d_loss")
        self.g_metric = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    @property
    def metrics(self):
        return [self.d_metric, self.g_metric]

    def train_step(self, real):
        rows = tf.shape(real)[0]
        fakes = self.generator(noise([ROWS, 3], 2))
        images = tf.concat([fakes, real], 0)
        labels = tf.concat([tf.ones([rows, 1]), tf.zeros([rows, 1])], 0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(images))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            scores = self.discriminator(self.generator(noise([ROWS, 3], 3)))
            g_loss = self.loss_fn(tf.zeros([rows, 1]), scores)
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.d_metric.update_state(d_loss)
        self.g_metric.update_state(g_loss)
        return {"d_loss": self.d_metric.result(), "g_loss": self.g_metric.result()}


class Monitor(keras.callbacks.Callback):
    """Looks at what the generator makes, in eager code."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.model.generator(data(3)).numpy())


def gan(wrap):
    """Two optimizers, and a callback that calls the generator."""
    keras.utils.set_random_seed(2)
    model, monitor = wrap(Gan()), Monitor()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1), loss)
    options = {"batch_size": ROWS, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(data(), callbacks=[monitor], **options).history
    made = model.generator.predict(data(3), verbose=0)
    return {**history, "seen": monitor.seen, "made": made, "weights": model.get_weights()}


class Shift(keras.layers.Layer):
    """A layer without layers in it; what it gives for a row depends on the others."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],), initializer="ones", name="shift")

    def call(self, x):
        return x * self.shift - tf.reduce_mean(x, 0, keepdims=True)


class Similarity(keras.layers.Layer):
    """A layer that compares all rows with all, by a temperature that is trained."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.project = keras.layers.Dense(3)

    def build(self, shape):
        self.project.build(shape)
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")

    def call(self, a, b):
        a, b = self.project(a), self.project(b)
        return tf.matmul(a, b, transpose_b=True) / self.temperature


class Contrastive(keras.Model):
    """Layers called alone beside a model: a head, one with weights, a comparison of rows."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = mlp(6, 8, "encoder")
        self.head, self.shift, self.similarity = keras.layers.Dense(4), Shift(), Similarity()
        self.flat = keras.layers.Flatten()

    def train_step(self, x):
        with tf.GradientTape() as tape:
            a = self.head(self.encoder(self.shift(x + noise([ROWS, 6], 4))))
            b = self.head(self.encoder(self.shift(x + noise([ROWS, 6], 5))))
            logits = self.flat(self.similarity(a, b))
            loss = tf.reduce_mean(
                keras.losses.sparse_categorical_crossentropy(tf.range(ROWS), logits, True)
            )
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"cost": loss}


def contrastive(wrap):
    """SimCLR and its like."""
    keras.utils.set_random_seed(3)
    model = wrap(Contrastive())
    model.compile(keras.optimizers.Adam(0.01))
    options = {"batch_size": ROWS, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(data(), **options).history
    return {**history, "weights": model.get_weights()}


class Distiller(keras.Model):
    """A frozen teacher and a student; the loss is an own `compute_loss`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.student = block(6, 3, "teacher"), mlp(6, 3, "student")
        self.teacher.trainable = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        given = super().compute_loss(x=x, y=y, y_pred=y_pred, training=training)
        soft = tf.nn.softmax(self.teacher(x, training=False) / 2.0)
        guessed = tf.nn.softmax(y_pred / 2.0)
        return 0.3 * given + 0.7 * tf.reduce_mean(keras.losses.kl_divergence(soft, guessed))

    def call(self, x):
        return self.student(x)


def distillation(wrap):
    """A teacher that is called by `compute_loss`, a student that is called as the model."""
    keras.utils.set_random_seed(4)
    model = wrap(Distiller())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    x, y = data(), np.arange(ROWS) % 3
    options = {"batch_size": ROWS, "verbose": 0}
    history = model.fit(x, y, epochs=3, shuffle=False, validation_data=(x, y), **options).history
    return {**history, "out": model.predict(x, **options), "weights": model.get_weights()}


class Ensemble(keras.Model):
    """Models in lists and dicts, and in a layer; one of them is in two places."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        shared = block(6, 6, "shared")
        self.experts = [mlp(6, 2, "first"), mlp(6, 2, "second")]
        self.by_name = {"trunk": shared, "whole": keras.Sequential([shared, block(6, 2, "top")])}

    def train_step(self, x):
        with tf.GradientTape() as tape:
            trunk = self.by_name["trunk"](x)
            outs = [expert(trunk) for expert in self.experts] + [self.by_name["whole"](x)]
            loss = tf.add_n([tf.reduce_mean(tf.square(out - 1.0)) for out in outs])
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"cost": loss}


def ensemble(wrap):
    """Parts that share layers."""
    keras.utils.set_random_seed(5)
    model = wrap(Ensemble())
    model.compile(keras.optimizers.Adam(0.01))
    options = {"batch_size": ROWS, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(data(), **options).history
    return {**history, "weights": model.get_weights()}


class Momentum(keras.Model):
    """A moving average of an encoder, which a step updates before it calls either."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.online, self.target = mlp(6, 4, "online"), mlp(6, 4, "target")

    def train_step(self, x):
        for slow, fast in zip(self.target.weights, self.online.weights, strict=True):
            slow.assign(0.5 * slow + 0.5 * fast)
        with tf.GradientTape() as tape:
            wanted = tf.stop_gradient(self.target(x + 0.1))
            loss = tf.reduce_mean(tf.square(self.online(x) - wanted))
        weights = self.online.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"cost": loss}


def momentum(wrap):
    """MoCo, BYOL, mean teachers."""
    keras.utils.set_random_seed(6)
    model = wrap(Momentum())
    model.compile(keras.optimizers.SGD(0.1))
    options = {"batch_size": ROWS, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(data(), **options).history
    return {**history, "weights": model.get_weights()}


def vae_predicted_first(wrap):
    """As `vae`, called as a whole before its parts are."""
    return vae(wrap, before="predict")


def vae_evaluated_first(wrap):
    """As `vae`, called as a whole before its parts are."""
    return vae(wrap, before="evaluate")


PROGRAMS = {
    program.__name__: program
    for program in (
        vae,
        vae_predicted_first,
        vae_evaluated_first,
        gan,
        contrastive,
        distillation,
        ensemble,
        momentum,
    )
}


def assert_same(found, wanted):
    """Compares the numbers of two runs of a program."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        for a, b in zip(tf.nest.flatten(found[name]), tf.nest.flatten(wanted[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)


def partitions_of(model):
    """Devices that the weights of a model are on."""
    return {weight.value.device for weight in model.weights}
