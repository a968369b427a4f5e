"""Programs in which weights move and move back, and gradients of several tasks meet."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.registry import program
from programs.second_order import Own, trained


@program("train_step")
def maml(wrap):
    """MAML: the loss after a step of gradient descent, by stateless_call."""

    class Maml(Own):
        def train_step(self, data):
            (x, x_later), (y, y_later) = data
            weights = self.trainable_variables
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = ops.mean((self(x) - y) ** 2)
                steps = inner.gradient(loss, weights)
                fast = [w - 0.1 * step for w, step in zip(weights, steps, strict=True)]
                found, _ = self.stateless_call(fast, [], x_later)
                later = ops.mean((found - y_later) ** 2)
            gradients = outer.gradient(later, weights)
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return {"loss": loss, "later": later}

    model = Maml()
    model(points(1))
    model = wrap(model)
    model.compile(keras.optimizers.SGD(0.05))
    data = (points(24), points(24, seed=1)), (points(24, 1), points(24, 1, seed=1))
    history = model.fit(*data, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def maml_by_hand(wrap):
    """MAML over the weights of the last layer, whose second pass is written out."""

    class Maml(Own):
        def call(self, x):
            features = self.two(self.one(x))
            return self.out(features), features

        def train_step(self, data):
            (x, x_later), (y, y_later) = data
            kernel, bias = self.out.trainable_variables
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = ops.mean((self(x)[0] - y) ** 2)
                of_kernel, of_bias = inner.gradient(loss, [kernel, bias])
                _, features = self(x_later)
                found = ops.matmul(features, kernel - 0.1 * of_kernel) + bias - 0.1 * of_bias
                later = ops.mean((found - y_later) ** 2)
            self.descend(outer, later)
            return {"loss": loss, "later": later}

    model = Maml()
    model(points(1))
    model = wrap(model)
    model.compile(keras.optimizers.SGD(0.05))
    data = (points(24), points(24, seed=1)), (points(24, 1), points(24, 1, seed=1))
    history = model.fit(*data, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def fomaml(wrap):
    """First-order MAML: weights move, their gradient is taken, and they move back."""

    class First(Own):
        def train_step(self, data):
            (x, x_later), (y, y_later) = data
            weights = self.trainable_variables
            with tf.GradientTape() as tape:
                loss = ops.mean((self(x) - y) ** 2)
            steps = tape.gradient(loss, weights)
            for weight, step in zip(weights, steps, strict=True):
                weight.assign_sub(0.1 * step)
            with tf.GradientTape() as tape:
                later = ops.mean((self(x_later) - y_later) ** 2)
            gradients = tape.gradient(later, weights)
            for weight, step in zip(weights, steps, strict=True):
                weight.assign_add(0.1 * step)
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return {"loss": loss, "later": later}

    model = First()
    model(points(1))
    model = wrap(model)
    model.compile(keras.optimizers.Adam(0.01))
    data = (points(24), points(24, seed=1)), (points(24, 1), points(24, 1, seed=1))
    history = model.fit(*data, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("fit")
def reptile(wrap):
    """Reptile: get_weights, some fits on a task, and set_weights between the two."""
    model = wrap(mlp(6, 8, 8, 1))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = []
    for task in range(3):
        before = model.get_weights()
        x, y = points(seed=task), points(columns=1, seed=task + 10)
        losses.append(model.fit(x, y, batch_size=12, epochs=2, verbose=0).history)
        after = model.get_weights()
        model.set_weights([b + 0.5 * (a - b) for a, b in zip(after, before, strict=True)])
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def sam(wrap):
    """Sharpness-aware minimization: up along the gradient, the gradient there, and back."""

    class Sam(Own):
        def train_step(self, data):
            x, y = data
            weights = self.trainable_variables
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            gradients = tape.gradient(loss, weights)
            norm = tf.linalg.global_norm(gradients)
            ups = [0.05 * gradient / (norm + 1e-12) for gradient in gradients]
            for weight, up in zip(weights, ups, strict=True):
                weight.assign_add(up)
            with tf.GradientTape() as tape:
                above = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(above, weights)
            for weight, up in zip(weights, ups, strict=True):
                weight.assign_sub(up)
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return self.compute_metrics(x, y, y_pred) | {"norm": norm, "above": above}

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return trained(
        wrap, Sam(4), keras.optimizers.SGD(0.1, momentum=0.9), points(24), labels(24),
        loss=loss, metrics=["accuracy"],
    )  # fmt: skip


@program("smp.step")
def sam_by_steps(wrap):
    """Sharpness-aware minimization in a loop of one's own."""
    model = wrap(mlp(6, 8, 8, 4))
    optimizer = keras.optimizers.SGD(0.1)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x, y):
        weights = model.trainable_variables
        gradients, loss = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        scale = 0.05 / (tf.linalg.global_norm(gradients) + 1e-12)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_add(scale * gradient)
        above, _ = forward_backward(x, y)
        above = [wrap.allreduce(gradient.accumulate()) for gradient in above]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_sub(scale * gradient)
        optimizer.apply_gradients(zip(above, weights, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    losses = [float(train(x, y)) for _ in range(3)]
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def gradient_surgery(wrap):
    """Gradient surgery: what two tasks disagree on is projected away, weight by weight."""

    class Surgery(Own):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                found = self(x, training=True)
                losses = [ops.mean((found[:, i] - y[:, i]) ** 2) for i in range(2)]
            one, other = (tape.gradient(loss, self.trainable_variables) for loss in losses)
            projected = []
            for a, b in zip(one, other, strict=True):
                dot = ops.sum(a * b)
                off_a = a - ops.minimum(dot, 0.0) * b / (ops.sum(b * b) + 1e-12)
                off_b = b - ops.minimum(dot, 0.0) * a / (ops.sum(a * a) + 1e-12)
                projected.append(off_a + off_b)
            self.optimizer.apply_gradients(zip(projected, self.trainable_variables, strict=True))
            return {"one": losses[0], "other": losses[1]}

    data = points(24), points(24, 2, seed=1)
    return trained(wrap, Surgery(2), keras.optimizers.SGD(0.1), *data)


@program("train_step")
def gradient_surgery_over_all_weights(wrap):
    """Gradient surgery with one dot product over all weights, flattened into a vector."""

    class Surgery(Own):
        def train_step(self, data):
            x, y = data
            weights = self.trainable_variables
            with tf.GradientTape(persistent=True) as tape:
                found = self(x, training=True)
                losses = [ops.mean((found[:, i] - y[:, i]) ** 2) for i in range(2)]
            vectors = [
                ops.concatenate([ops.reshape(g, (-1,)) for g in tape.gradient(loss, weights)])
                for loss in losses
            ]
            dot = ops.sum(vectors[0] * vectors[1])
            one, other = vectors
            total = one + other
            total -= ops.minimum(dot, 0.0) * other / ops.sum(other**2)
            total -= ops.minimum(dot, 0.0) * one / ops.sum(one**2)
            parts = tf.split(total, [int(np.prod(w.shape)) for w in weights])
            gradients = [ops.reshape(p, w.shape) for p, w in zip(parts, weights, strict=True)]
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return {"one": losses[0], "other": losses[1], "dot": dot}

    data = points(24), points(24, 2, seed=1)
    return trained(wrap, Surgery(2), keras.optimizers.SGD(0.1), *data)


@program("train_step")
def uncertainty_weights(wrap):
    """Two tasks whose weights in the loss are trained as well."""

    class Weighted(Own):
        def __init__(self):
            super().__init__(2)
            self.logs = self.add_weight(shape=(2,), initializer="zeros", name="logs")

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                errors = ops.mean((self(x, training=True) - y) ** 2, axis=0)
                loss = ops.sum(ops.exp(-self.logs) * errors + self.logs)
            self.descend(tape, loss)
            return {"loss": loss, "first": errors[0], "second": errors[1]}

    data = points(24), points(24, 2, seed=1)
    return trained(wrap, Weighted(), keras.optimizers.Adam(0.02), *data)
