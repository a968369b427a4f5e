"""Programs with gradients of gradients, or with weights that move between two gradients."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, only_x, points, sums
from programs.registry import program


class Own(keras.Model):
    """A model of two hidden layers whose subclass says how it is trained."""

    def __init__(self, outputs=1, activation="tanh"):
        super().__init__()
        self.one = keras.layers.Dense(8, activation=activation)
        self.two = keras.layers.Dense(8, activation=activation)
        self.out = keras.layers.Dense(outputs)

    def call(self, x):
        return self.out(self.two(self.one(x)))

    def descend(self, tape, loss):
        gradients = tape.gradient(loss, self.trainable_variables)
        pairs = zip(gradients, self.trainable_variables, strict=True)
        self.optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])


def trained(wrap, model, optimizer, *data, epochs=3, **compiled):
    model(data[0][:1])
    model = wrap(model)
    model.compile(optimizer, **compiled)
    history = model.fit(*data, batch_size=12, epochs=epochs, shuffle=False, verbose=0).history
    return {
        "history": history,
        "predictions": model.predict(data[0], batch_size=12, verbose=0),
        "weights": sums(model),
    }


def harmonic(model, x, y):
    """The residual of u_xx + u_yy = 0."""
    with tf.GradientTape(persistent=True) as second:
        second.watch([x, y])
        with tf.GradientTape(persistent=True) as first:
            first.watch([x, y])
            u = model(tf.concat([x, y], axis=1))
        u_x, u_y = first.gradient(u, x), first.gradient(u, y)
    return second.gradient(u_x, x) + second.gradient(u_y, y)


@program("train_step")
def pinn(wrap):
    """Physics-informed network: second derivatives in the loss, and the border."""

    class Pinn(Own):
        def train_step(self, data):
            inside, (border, value) = data
            with tf.GradientTape() as tape:
                residual = harmonic(self, inside[:, :1], inside[:, 1:])
                physics = ops.mean(residual**2)
                loss = physics + ops.mean((self(border) - value) ** 2)
            self.descend(tape, loss)
            return {"loss": loss, "physics": physics}

    border = points(24, 2, seed=1)
    data = points(24, 2), (border, border[:, :1] ** 2 - border[:, 1:] ** 2)
    return trained(wrap, Pinn(), keras.optimizers.Adam(0.01), *data, epochs=2)


@program("smp.step")
def pinn_by_steps(wrap):
    """Physics-informed network in a loop of one's own."""
    model = wrap(mlp(2, 8, 8, 1))
    optimizer = keras.optimizers.SGD(0.05)

    @wrap.step
    def forward_backward(x, y, border, value):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(harmonic(model, x, y) ** 2)
            loss += tf.reduce_mean((model(border) - value) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(*batch):
        gradients, loss = forward_backward(*batch)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    batch = wrap.shard(points(12, 1), points(12, 1, 1), points(12, 2, 2), points(12, 1, 3))
    losses = [float(train(*map(tf.constant, batch))) for _ in range(3)]
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def heat_equation(wrap):
    """Physics-informed network whose diffusivity is a weight of the model."""

    class Heat(Own):
        def __init__(self):
            super().__init__()
            self.diffusivity = self.add_weight(shape=(), initializer="ones", name="diffusivity")

        def train_step(self, data):
            place, value = data
            x, t = place[:, :1], place[:, 1:]
            with tf.GradientTape() as tape:
                with tf.GradientTape() as second:
                    second.watch(x)
                    with tf.GradientTape(persistent=True) as first:
                        first.watch([x, t])
                        u = self(tf.concat([x, t], axis=1))
                    u_x, u_t = first.gradient(u, x), first.gradient(u, t)
                residual = u_t - self.diffusivity * second.gradient(u_x, x)
                loss = ops.mean(residual**2) + ops.mean((u - value) ** 2)
            self.descend(tape, loss)
            return {"loss": loss, "diffusivity": self.diffusivity.value}

    data = points(24, 2), points(24, 1, seed=1)
    return trained(wrap, Heat(), keras.optimizers.SGD(0.05), *data, epochs=2)


@program("train_step")
def sliced_score_matching(wrap):
    """Score matching along random directions."""

    class Score(Own):
        def __init__(self):
            super().__init__(6)
            self.seeds = keras.random.SeedGenerator(5)

        def train_step(self, data):
            x = only_x(data)
            direction = keras.random.normal(ops.shape(x), seed=self.seeds)
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    score = self(x)
                    along = ops.sum(score * direction)
                curvature = ops.sum(inner.gradient(along, x) * direction, axis=1)
                loss = ops.mean(curvature + 0.5 * ops.sum(score**2, axis=1))
            self.descend(outer, loss)
            return {"loss": loss}

    return trained(wrap, Score(), keras.optimizers.SGD(0.05), points(24))


@program("train_step")
def energy_based(wrap):
    """Energy-based model: examples of its own by Langevin steps, then contrastive divergence."""

    class Energy(Own):
        def __init__(self):
            super().__init__(activation="swish")
            self.seeds = keras.random.SeedGenerator(5)

        def train_step(self, data):
            real = only_x(data)
            x = keras.random.normal(ops.shape(real), seed=self.seeds)
            for _ in range(3):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    energy = ops.sum(self(x))
                x -= 0.1 * tape.gradient(energy, x)
                x += 0.01 * keras.random.normal(ops.shape(x), seed=self.seeds)
            x = ops.stop_gradient(x)
            with tf.GradientTape() as tape:
                low, high = self(real), self(x)
                loss = ops.mean(low) - ops.mean(high) + 0.1 * ops.mean(low**2 + high**2)
            self.descend(tape, loss)
            return {"loss": loss, "gap": ops.mean(high) - ops.mean(low)}

    return trained(wrap, Energy(), keras.optimizers.Adam(0.01), points(24), epochs=2)


@program("train_step")
def small_gradients(wrap):
    """The norm of the gradients of the weights, in the loss."""

    class Flat(Own):
        def train_step(self, data):
            x, y = data
            weights = self.trainable_variables
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = ops.mean((self(x, training=True) - y) ** 2)
                gradients = inner.gradient(loss, weights)
                norm = sum(ops.sum(ops.square(gradient)) for gradient in gradients)
                total = loss + 0.1 * norm
            self.descend(outer, total)
            return {"loss": loss, "norm": norm}

    return trained(wrap, Flat(), keras.optimizers.SGD(0.05), points(24), points(24, 1, seed=1))


@program("train_step")
def input_jacobian(wrap):
    """A classifier whose Jacobian by its inputs is kept small."""

    class Robust(Own):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as outer:
                with tf.GradientTape(persistent=True) as inner:
                    inner.watch(x)
                    logits = self(x, training=True)
                    columns = [logits[:, i] for i in range(4)]
                loss = self.compute_loss(x=x, y=y, y_pred=logits)
                slopes = [inner.gradient(column, x) for column in columns]
                loss += 0.1 * sum(ops.mean(ops.sum(slope**2, axis=1)) for slope in slopes)
            self.descend(outer, loss)
            return {"loss": loss}

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return trained(wrap, Robust(4), keras.optimizers.SGD(0.1), points(24), labels(24), loss=loss)
