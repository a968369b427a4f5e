"""Programs with optimizers of their own, and with gradients that are looked at or changed."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.registry import program


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Classifier(keras.Model):
    """A classifier; `change` of a subclass gets the gradients before they are applied."""

    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(8, activation="tanh")
        self.two = keras.layers.Dense(8, activation="tanh")
        self.logits = keras.layers.Dense(4)

    def build(self, shape):
        self.one.build(shape)
        self.two.build((None, 8))
        self.logits.build((None, 8))

    def call(self, x):
        return self.logits(self.two(self.one(x)))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        logs = self.change(gradients) or {}
        return self.compute_metrics(x, y, y_pred) | {"total": loss} | logs

    def change(self, gradients):
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))


def trained(wrap, model, optimizer, epochs=3, callbacks=None, **options):
    model(points(1))
    model = wrap(model)
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    x, y = points(24), labels(24)
    history = model.fit(
        x, y, batch_size=12, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options
    ).history
    return {"history": history, "scores": model.evaluate(x, y, verbose=0), "weights": sums(model)}


@program("train_step")
def accumulation_by_hand(wrap):
    """Gradients are added up in variables of the model and applied every second batch."""

    class Accumulating(Classifier):
        def build(self, shape):
            super().build(shape)
            self.held = [
                self.add_weight(shape=w.shape, initializer="zeros", trainable=False)
                for w in self.trainable_variables
            ]
            self.batches = self.add_weight(shape=(), dtype="int32", trainable=False)

        def change(self, gradients):
            self.batches.assign_add(1)
            for held, gradient in zip(self.held, gradients, strict=True):
                held.assign_add(gradient)
            tf.cond(ops.equal(self.batches % 2, 0), self.apply_held, lambda: None)

        def apply_held(self):
            means = [held / 2 for held in self.held]
            self.optimizer.apply_gradients(zip(means, self.trainable_variables, strict=True))
            for held in self.held:
                held.assign(ops.zeros_like(held))

    return trained(wrap, Accumulating(), keras.optimizers.SGD(0.2))


@program("smp.step")
def accumulation_by_hand_in_steps(wrap):
    """Gradients of several steps are added up in Python and applied once."""
    model = wrap(mlp(6, 8, 8, 4))
    optimizer, loss_fn = keras.optimizers.Adam(0.01), crossentropy()

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True)) / 2.0
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(batches):
        totals, losses = None, []
        for x, y in batches:
            gradients, loss = forward_backward(x, y)
            gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
            totals = gradients if totals is None else [
                total + gradient for total, gradient in zip(totals, gradients, strict=True)
            ]  # fmt: skip
            losses.append(wrap.allreduce(loss.reduce_mean()))
        optimizer.apply_gradients(zip(totals, model.trainable_variables, strict=True))
        return losses

    batches = [
        tuple(map(tf.constant, wrap.shard(points(seed=i), labels(seed=i)))) for i in range(2)
    ]
    losses = [[float(loss) for loss in train(batches)] for _ in range(3)]
    return {"losses": losses, "weights": sums(model)}


@program("fit")
def accumulation_by_the_optimizer(wrap):
    """An optimizer that applies gradients every third batch."""
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    model = wrap(mlp(6, 8, 8, 4))
    model.compile(optimizer, crossentropy())
    history = model.fit(
        points(36), labels(36), batch_size=6, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model), "steps": int(optimizer.iterations)}


class Lars(keras.optimizers.Optimizer):
    """A rate for each weight: the norm of the weight over that of its gradient."""

    def __init__(self, learning_rate=0.1, momentum=0.9, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.velocities = [self.add_variable_from_reference(v, name="velocity") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        gradient = gradient + 1e-4 * variable
        size, slope = ops.norm(variable), ops.norm(gradient)
        trust = ops.where((size > 0) & (slope > 0), size / (slope + 1e-9), 1.0)
        rate = ops.cast(learning_rate, variable.dtype) * trust
        velocity = self.velocities[self._get_variable_index(variable)]
        self.assign(velocity, self.momentum * velocity + rate * gradient)
        self.assign_sub(variable, velocity)


@program("fit")
def lars(wrap):
    """LARS as an optimizer of one's own, with norms of weights and gradients."""
    return trained(wrap, mlp(6, 8, 8, 4), Lars(0.05))


@program("smp.step")
def lars_by_steps(wrap):
    """LARS in a loop of one's own."""
    model = wrap(mlp(6, 8, 8, 4))
    optimizer, loss_fn = Lars(0.05), crossentropy()

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    losses = [float(train(x, y)) for _ in range(3)]
    return {"losses": losses, "weights": sums(model)}


class Centralized(keras.optimizers.SGD):
    """Takes the mean of each kernel's gradient away."""

    def apply(self, grads, trainable_variables=None):
        centred = []
        for gradient in grads:
            if len(gradient.shape) > 1:
                axes = list(range(len(gradient.shape) - 1))
                gradient = gradient - tf.reduce_mean(gradient, axis=axes, keepdims=True)
            centred.append(gradient)
        return super().apply(centred, trainable_variables)


@program("fit")
def gradient_centralization(wrap):
    """An optimizer that changes all gradients in its apply."""
    return trained(wrap, mlp(6, 8, 8, 4), Centralized(0.2, momentum=0.9))


@program("fit")
def lookahead(wrap):
    """Lookahead: a callback that moves slow weights after each epoch."""

    class Lookahead(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.slow = self.model.get_weights()

        def on_epoch_end(self, epoch, logs=None):
            pairs = zip(self.slow, self.model.get_weights(), strict=True)
            self.slow = [slow + 0.5 * (fast - slow) for slow, fast in pairs]
            self.model.set_weights(self.slow)

    return trained(wrap, mlp(6, 8, 8, 4), keras.optimizers.Adam(0.02), callbacks=[Lookahead()])


@program("fit")
def elastic_weights(wrap):
    """Elastic weight consolidation: a second task, near the weights of the first one."""
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)]
    model = wrap(keras.Sequential([keras.Input((6,)), *layers]))
    model.compile(keras.optimizers.SGD(0.2), crossentropy())
    x, y = points(24), labels(24)
    first = model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    anchors = model.get_weights()

    class Near(keras.regularizers.Regularizer):
        def __init__(self, anchor):
            self.anchor = anchor

        def __call__(self, weight):
            return 0.5 * ops.sum((weight - ops.cast(self.anchor, weight.dtype)) ** 2)

    for layer, anchor in zip(layers, anchors[::2], strict=True):
        layer.kernel.regularizer = Near(anchor)
    model.compile(keras.optimizers.SGD(0.2), crossentropy())
    second = model.fit(
        points(24, seed=1), labels(24, seed=3), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"first": first, "second": second, "weights": sums(model)}
