"""Programs that look at gradients and weights, or change them, before they are applied."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.optimizing import Classifier, crossentropy, trained
from programs.registry import RANKS, program, refused

JACOBIAN = refused(
    RANKS,
    "StepError",
    "tape.jacobian was called",
    "a Jacobian through several processes; one example per microbatch gives the same",
)


@program("train_step")
def gradient_centralization_in_a_step(wrap):
    """Gradients are centred in the train_step, with `if` over their shapes."""

    class Centring(Classifier):
        def change(self, gradients):
            centred = [g - ops.mean(g, axis=0) if len(g.shape) > 1 else g for g in gradients]
            self.optimizer.apply_gradients(zip(centred, self.trainable_variables, strict=True))
            return {"kernels": ops.sum(ops.abs(centred[0])) + ops.sum(ops.abs(centred[-2]))}

    return trained(wrap, Centring(), keras.optimizers.SGD(0.2))


@program("train_step")
def signs_with_momentum(wrap):
    """An optimizer within the train_step: signs of moving averages, decoupled decay."""

    class Signs(Classifier):
        def build(self, shape):
            super().build(shape)
            self.means = [
                self.add_weight(shape=w.shape, initializer="zeros", trainable=False)
                for w in self.trainable_variables
            ]

        def change(self, gradients):
            for w, mean, g in zip(self.trainable_variables, self.means, gradients, strict=True):
                w.assign_sub(0.01 * (ops.sign(0.9 * mean + 0.1 * g) + 0.1 * w))
                mean.assign(0.99 * mean + 0.01 * g)

    return trained(wrap, Signs(), keras.optimizers.SGD(0.0))


@program("train_step")
def two_optimizers(wrap):
    """Another optimizer for the first layers than for the head."""

    class Two(Classifier):
        def compile(self, slow, fast, **kwargs):
            super().compile(optimizer=slow, **kwargs)
            self.fast = fast

        def change(self, gradients):
            pairs = list(zip(gradients, self.trainable_variables, strict=True))
            self.optimizer.apply_gradients(pairs[:2])
            self.fast.apply_gradients(pairs[2:])

    model = wrap(Two())
    model.compile(keras.optimizers.SGD(0.02), keras.optimizers.Adam(0.01), loss=crossentropy())
    history = model.fit(
        points(24), labels(24), batch_size=12, epochs=3, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def clipped_by_global_norm(wrap):
    """Gradients clipped by the norm over all of them, which is logged."""

    class Clipping(Classifier):
        def change(self, gradients):
            clipped, norm = tf.clip_by_global_norm(gradients, 0.1)
            self.optimizer.apply_gradients(zip(clipped, self.trainable_variables, strict=True))
            return {"norm": norm}

    return trained(wrap, Clipping(), keras.optimizers.SGD(0.5))


@program("train_step")
def adaptive_clipping(wrap):
    """Each gradient is clipped by the norm of its weight (adaptive gradient clipping)."""

    class Adaptive(Classifier):
        def change(self, gradients):
            clipped = []
            for gradient, weight in zip(gradients, self.trainable_variables, strict=True):
                limit = 0.1 * ops.maximum(ops.norm(weight), 1e-3)
                norm = ops.norm(gradient)
                clipped.append(ops.where(norm > limit, gradient * limit / norm, gradient))
            self.optimizer.apply_gradients(zip(clipped, self.trainable_variables, strict=True))

    return trained(wrap, Adaptive(), keras.optimizers.SGD(0.5))


@program("train_step")
def norms_logged(wrap):
    """Norms of weights and gradients, and their ratio, as logs."""

    class Logging(Classifier):
        def change(self, gradients):
            weights = self.trainable_variables
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            of_weights = tf.linalg.global_norm([weight.value for weight in weights])
            of_gradients = tf.linalg.global_norm(gradients)
            each = {f"norm_{i}": ops.norm(g) for i, g in enumerate(gradients)}
            largest = ops.max(ops.stack([ops.max(ops.abs(w)) for w in weights]))
            return {"weights": of_weights, "gradients": of_gradients, "largest": largest} | each

    return trained(wrap, Logging(), keras.optimizers.SGD(0.2))


@program("smp.step")
def norms_logged_in_steps(wrap):
    """Norms of weights and gradients in a loop of one's own."""
    model = wrap(mlp(6, 8, 8, 4))
    optimizer, loss_fn = keras.optimizers.SGD(0.1), crossentropy()

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        norms = [tf.norm(gradient) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        sizes = [tf.norm(weight) for weight in model.trainable_variables]
        return wrap.allreduce(loss.reduce_mean()), tf.stack(norms), tf.stack(sizes)

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    found = [[np.asarray(value) for value in train(x, y)] for _ in range(3)]
    return {"found": found, "weights": sums(model)}


@program("train_step")
def penalty_on_weights(wrap):
    """The squares of all kernels in the loss, written out by hand."""

    class Decaying(Classifier):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                decay = ops.sum(
                    [ops.sum(ops.square(v)) for v in self.trainable_variables if "kernel" in v.name]
                )
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred) + 0.01 * decay
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return self.compute_metrics(x, y, y_pred) | {"decay": decay}

    return trained(wrap, Decaying(), keras.optimizers.SGD(0.2))


@program("train_step")
def orthogonal_penalty(wrap):
    """compute_loss with a penalty on a kernel that is not orthogonal."""

    class Orthogonal(Classifier):
        def train_step(self, data):
            return keras.Model.train_step(self, data)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            kernel = self.two.kernel
            off = ops.matmul(ops.transpose(kernel), kernel) - ops.eye(8, dtype=kernel.dtype)
            return super().compute_loss(x, y, y_pred, sample_weight) + 0.05 * ops.sum(off**2)

    return trained(wrap, Orthogonal(), keras.optimizers.SGD(0.2))


@program("train_step", refused=JACOBIAN)
def per_example_gradients(wrap):
    """Differential privacy: each example's gradient is clipped, by a Jacobian of the losses."""

    class Private(Classifier):
        def train_step(self, data):
            x, y = data
            weights = self.trainable_variables
            with tf.GradientTape() as tape:
                logits = self(x, training=True)
                losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
            each = tape.jacobian(losses, weights)
            squares = [ops.sum(ops.reshape(g, (12, -1)) ** 2, axis=1) for g in each]
            scale = ops.minimum(1.0, 0.5 / ops.sqrt(sum(squares)))
            clipped = [ops.tensordot(scale, g, axes=1) / 12.0 for g in each]
            self.optimizer.apply_gradients(zip(clipped, weights, strict=True))
            return self.compute_metrics(x, y, logits) | {"scale": ops.mean(scale)}

    return trained(wrap, Private(), keras.optimizers.SGD(0.5), epochs=2)


@program("smp.step", microbatches=3, why="plain Keras clips for the same microbatches")
def gradients_of_each_microbatch(wrap):
    """Differential privacy over microbatches: the gradient of each is clipped."""
    model = wrap(mlp(6, 8, 4))
    optimizer, loss_fn = keras.optimizers.SGD(0.2), crossentropy()

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        norm = tf.sqrt(tf.add_n([tf.reduce_sum(g**2) for g in gradients]))
        return [g / tf.maximum(norm / 0.2, 1.0) for g in gradients], loss, norm

    @tf.function
    def train(x, y):
        gradients, loss, norms = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean()), norms.stack()

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    found = [train(x, y) for _ in range(3)]
    return {
        "losses": [float(loss) for loss, _ in found],
        "norms": wrap.unshard(found[-1][1]),
        "weights": sums(model),
    }
