"""Programs that look into a trained model: activations, gradients by inputs, sub-models."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import images, labels, mlp, points, sums
from programs.registry import program


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def cnn():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv1")(inputs)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv2")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))


def fitted(wrap, model, x, y):
    model = wrap(model)
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    history = model.fit(x, y, batch_size=12, shuffle=False, verbose=0).history
    return model, history


@program("smp.step")
def grad_cam(wrap):
    """Grad-CAM: a sub-model with the activations of a convolution, and gradients by them."""
    model, history = fitted(wrap, cnn(), images(), labels())
    both = wrap(keras.Model(model.inputs, [model.get_layer("conv2").output, model.output]))

    @wrap.step
    def look(x):
        with tf.GradientTape() as tape:
            activations, logits = both(x, training=False)
            tape.watch(activations)
            score = tf.reduce_sum(tf.reduce_max(logits, axis=1))
        slopes = tape.gradient(score, activations)
        weights = tf.reduce_mean(slopes, axis=(1, 2), keepdims=True)
        return tf.nn.relu(tf.reduce_sum(activations * weights, axis=-1)), logits

    maps, logits = look(tf.constant(wrap.shard(images(seed=3))))
    return {
        "history": history,
        "maps": wrap.unshard(maps.merge()),
        "logits": wrap.unshard(logits.merge()),
    }


@program("smp.step")
def saliency(wrap):
    """Smoothed gradients by the pixels."""
    model, history = fitted(wrap, cnn(), images(), labels())

    @wrap.step
    def look(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            score = tf.reduce_sum(tf.reduce_max(model(x, training=False), axis=1))
        return tape.gradient(score, x)

    x = images(seed=3)
    noisy = [wrap.shard(x + 0.1 * images(seed=4 + i)) for i in range(3)]
    found = sum(look(tf.constant(each)).merge() for each in noisy)
    return {"history": history, "slopes": wrap.unshard(found)}


@program("smp.step")
def integrated_gradients(wrap):
    """Integrated gradients along the way from a grey picture, in a tf.function with a loop."""
    model, history = fitted(wrap, mlp(6, 8, 8, 4), points(), labels())

    @wrap.step
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            score = tf.reduce_sum(tf.nn.softmax(model(x, training=False))[:, 0])
        return tape.gradient(score, x), score

    @tf.function
    def integrate(x):
        total = tf.zeros_like(x)
        for share in (0.125, 0.375, 0.625, 0.875):
            total += slope(share * x)[0].merge() / 4.0
        return total * x

    x = wrap.shard(points(seed=4))
    return {"history": history, "found": wrap.unshard(integrate(tf.constant(x)))}


@program("smp.step")
def deep_dream(wrap):
    """The input climbs the activations of a frozen model."""
    model = wrap(cnn())
    model.trainable = False

    @wrap.step
    def climb(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            height = tf.reduce_mean(model(x, training=False) ** 2)
        slope = tape.gradient(height, x)
        return x + 0.1 * slope / (tf.math.reduce_std(slope) + 1e-8), height

    x = tf.constant(wrap.shard(images()))
    heights = []
    for _ in range(3):
        x, height = climb(x)
        x = x.merge()
        heights.append(float(wrap.allreduce(height.reduce_mean())))
    return {"heights": heights, "pictures": wrap.unshard(x)}


@program("fit")
def feature_extraction(wrap):
    """Features of a trained model's hidden layer, on which a second model is trained."""
    x, y = images(24), labels(24)
    model, history = fitted(wrap, cnn(), x, y)
    extractor = wrap(keras.Model(model.inputs, model.get_layer("conv2").output))
    features = extractor.predict(x, batch_size=12, verbose=0).mean(axis=(1, 2))
    head = wrap(mlp(4, 8, 4))
    head.compile(keras.optimizers.SGD(0.1), crossentropy())
    second = head.fit(features, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "second": second, "features": features, "weights": sums(head)}


@program("fit")
def new_head(wrap):
    """Transfer: a new head on the layers of a trained model, which are frozen, then not."""
    x, y = images(24), labels(24)
    base, history = fitted(wrap, cnn(), x, y)
    hidden = base.get_layer("conv2").output
    head = keras.layers.Dense(2, name="new")(keras.layers.GlobalAveragePooling2D()(hidden))
    model = wrap(keras.Model(base.input, head))
    model.get_layer("conv1").trainable = model.get_layer("conv2").trainable = False
    found = []
    for rate in (0.2, 0.05):
        model.compile(keras.optimizers.SGD(rate), crossentropy())
        found.append(model.fit(x, y % 2, batch_size=12, shuffle=False, verbose=0).history)
        for layer in model.layers:
            layer.trainable = True
    return {"history": history, "found": found, "weights": sums(base, model)}


@program("fit")
def base_as_a_layer(wrap):
    """Transfer: a trained model is one layer of a new one, frozen, then not."""
    base, history = fitted(wrap, mlp(6, 8, 8, 5), points(24), labels(24))
    base.trainable = False
    inputs = keras.Input((6,))
    outputs = keras.layers.Dense(3)(keras.layers.Activation("tanh")(base(inputs, training=False)))
    model = wrap(keras.Model(inputs, outputs))
    found = []
    for trainable in (False, True):
        base.trainable = trainable
        model.compile(keras.optimizers.Adam(0.01), crossentropy())
        found.append(
            model.fit(points(24), labels(24, 3), batch_size=12, shuffle=False, verbose=0).history
        )
    return {"history": history, "found": found, "weights": sums(model)}


@program("fit")
def perceptual_loss(wrap):
    """compute_loss with the features of a frozen network."""

    class Perceptual(keras.Model):
        def __init__(self, net, judge):
            super().__init__()
            self.net, self.judge = net, judge
            self.judge.trainable = False

        def call(self, x):
            return self.net(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight)
            return loss + ops.mean((self.judge(y_pred) - self.judge(y)) ** 2)

    conv = keras.layers.Conv2D
    net = keras.Sequential(
        [keras.Input((8, 8, 1)), conv(4, 3, padding="same", activation="relu"), conv(1, 1)]
    )
    judge = keras.Sequential([keras.Input((8, 8, 1)), conv(3, 3, activation="tanh"), conv(3, 3)])
    model = wrap(Perceptual(net, judge))
    model.compile(keras.optimizers.Adam(0.01), "mae")
    x = images(24)
    history = model.fit(x, x**2, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def monte_carlo_dropout(wrap):
    """A predict_step of one's own, and metrics of one's own in train_step and test_step."""

    class Uncertain(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.out = keras.layers.Dense(2)
            self.error = keras.metrics.RootMeanSquaredError(name="error")

        @property
        def metrics(self):
            return [self.error]

        def call(self, x):
            return self.out(self.hidden(x))

        def likelihood(self, y, found):
            mean, log_variance = found[:, :1], found[:, 1:]
            self.error.update_state(y, mean)
            return ops.mean(0.5 * log_variance + 0.5 * (y - mean) ** 2 * ops.exp(-log_variance))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.likelihood(y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss, "error": self.error.result()}

        def test_step(self, data):
            x, y = data
            return {"loss": self.likelihood(y, self(x)), "error": self.error.result()}

        def predict_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            found = [self(x * scale)[:, 0] for scale in (0.9, 1.0, 1.1)]
            return {"mean": sum(found) / 3.0, "spread": ops.std(ops.stack(found), axis=0)}

    model = wrap(Uncertain())
    model.compile(keras.optimizers.SGD(0.05))
    x, y = points(24), points(24, 1, seed=1)
    history = model.fit(
        x, y, batch_size=12, epochs=2, shuffle=False, verbose=0, validation_split=0.5
    ).history
    return {"history": history, "found": model.predict(x, batch_size=8, verbose=0)}


@program("fit")
def layers_read_after_fit(wrap):
    """Weights by layer after fit, with get_weights of the model, and a model made of them."""
    model, history = fitted(wrap, mlp(6, 8, 8, 4), points(24), labels(24))
    plain = mlp(6, 8, 8, 4)
    plain.set_weights(model.get_weights())
    return {
        "history": history,
        "plain": plain.predict(points(), verbose=0),
        "largest": [float(np.abs(w).max()) for w in model.get_weights()],
    }
