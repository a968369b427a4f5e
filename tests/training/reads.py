"""Programs that read weights and gradients, wherever they are: the same in one process and many.

Each takes a function that makes a model a split one, or leaves it, and gives numbers.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Wrap = Callable[[Any], Any]


def data(rows: int = 16) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(rows, 6)), random.normal(size=(rows, 4))
    return x.astype("float32"), y.astype("float32")


class Net(keras.Model):
    """Two layers; a train_step whose parts programs replace."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        keras.utils.set_random_seed(seed)
        self.a = keras.layers.Dense(8, "tanh", bias_initializer="ones")
        self.b = keras.layers.Dense(4, bias_initializer="ones")

    def call(self, x: Any) -> Any:
        return self.b(self.a(x))

    def penalty(self) -> Any:
        return 0.0

    def change(self, gradients: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return gradients, {}

    def after(self) -> dict[str, Any]:
        return {}

    def train_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            penalty = self.penalty()
            total = loss + penalty
        gradients = tape.gradient(total, self.trainable_variables)
        gradients, logs = self.change(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss, "penalty": penalty, **logs, **self.after()}


def fitted(model: Any, wrap: Wrap, optimizer: Any = None, **options: Any) -> dict[str, Any]:
    model = wrap(model)
    model.compile(optimizer or keras.optimizers.SGD(0.1))
    x, y = data()
    options = {"batch_size": 8, "epochs": 2, **options}
    logs = model.fit(x, y, verbose=0, shuffle=False, **options).history
    return {**logs, "weights": model.get_weights()}


# ------------------------------------------------------------------------------ reads of weights


def penalty_by_hand(wrap: Wrap) -> Any:
    class Penalised(Net):
        def penalty(self) -> Any:
            squares = [tf.reduce_sum(tf.square(v.value)) for v in self.trainable_variables]
            return 0.01 * tf.add_n(squares) ** 2

    return fitted(Penalised(), wrap)


def penalty_of_pairs(wrap: Wrap) -> Any:
    """What is computed of weights of two processes."""

    class Penalised(Net):
        def penalty(self) -> Any:
            return 0.1 * tf.reduce_sum(tf.abs(self.a.kernel @ self.b.kernel))

    return fitted(Penalised(), wrap)


def statistics_of_weights(wrap: Wrap) -> Any:
    class Logging(Net):
        def after(self) -> dict[str, Any]:
            weights = [tf.convert_to_tensor(v) for v in self.trainable_variables]
            return {
                "mean": tf.reduce_mean([tf.reduce_mean(v) for v in weights]),
                "max": tf.reduce_max([tf.reduce_max(v) for v in weights]),
                "norm": tf.linalg.global_norm(weights),
                "first": self.a.kernel[0, 0] + self.b.kernel[0, 0],
                "rows": tf.reduce_sum(tf.gather(self.b.kernel.value, [1, 1])),
            }

    return fitted(Logging(), wrap)


def weights_before_and_after(wrap: Wrap) -> Any:
    class Logging(Net):
        def change(self, gradients: list[Any]) -> Any:
            self.before = [tf.convert_to_tensor(v) for v in self.trainable_variables]
            return gradients, {}

        def after(self) -> dict[str, Any]:
            pairs = zip(self.before, self.trainable_variables, strict=True)
            return {"moved": tf.add_n([tf.reduce_sum(tf.abs(v - old)) for old, v in pairs])}

    return fitted(Logging(), wrap)


def weights_in_compute_loss(wrap: Wrap) -> Any:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def call(self, x: Any) -> Any:
            return self.inner(x)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any
        ) -> Any:
            squares = [tf.reduce_sum(v.value**2) for v in self.trainable_variables]
            return tf.reduce_mean((y - y_pred) ** 2) + 0.01 * tf.add_n(squares)

    return fitted(Own(), wrap)


def weights_in_a_metric(wrap: Wrap) -> Any:
    model = Net()

    class Norm(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="norm")
            self.value = self.add_weight(shape=(), initializer="zeros", name="value")

        def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.value.assign(tf.linalg.global_norm([v.value for v in model.trainable_variables]))

        def result(self) -> Any:
            return self.value.value

    plain = type("Plain", (Net,), {"train_step": keras.Model.train_step})
    model.__class__ = plain
    model = wrap(model)
    model.compile("sgd", "mse", metrics=[Norm()])
    x, y = data()
    logs = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    return {**logs, "evaluated": model.evaluate(x, y, batch_size=8, verbose=0)}


def weights_in_test_and_predict_steps(wrap: Wrap) -> Any:
    class Own(Net):
        def test_step(self, batch: Any) -> dict[str, Any]:
            return {"sum": tf.add_n([tf.reduce_sum(v.value) for v in self.weights])}

        def predict_step(self, x: Any) -> Any:
            return self(x) * tf.add_n([tf.reduce_sum(v.value) for v in self.weights])

    model = wrap(Own())
    model.compile("sgd")
    x, y = data()
    model.predict(x, batch_size=8, verbose=0)
    return [
        model.evaluate(x, y, batch_size=8, verbose=0),
        model.predict(x, batch_size=8, verbose=0),
    ]


def moving_averages(wrap: Wrap) -> Any:
    """A target network that follows, updated in a loop over all weights."""

    class Following(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = Net(1), Net(2)

        def call(self, x: Any) -> Any:
            return self.online(x) + self.target(x)

        def train_step(self, batch: Any) -> dict[str, Any]:
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            weights = self.online.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            for a, b in zip(self.target.weights, self.online.weights, strict=True):
                a.assign(0.9 * a + 0.1 * b)
            return {"loss": loss}

    return fitted(Following(), wrap)


def averages_now_and_then(wrap: Wrap) -> Any:
    """The same in a branch."""

    class Following(Net):
        def __init__(self) -> None:
            super().__init__()
            self.step = self.add_weight(shape=(), dtype="int32", trainable=False, name="step")

        def after(self) -> dict[str, Any]:
            self.step.assign(self.step + 1)

            def swap() -> Any:
                self.b.bias.assign(0.5 * self.b.bias + tf.reduce_mean(self.a.bias.value))
                self.a.bias.assign(0.5 * self.a.bias)
                return 0

            tf.cond(self.step % 2 == 0, swap, lambda: 0)
            return {"bias": tf.reduce_sum(self.b.bias.value)}

    return fitted(Following(), wrap)


# ------------------------------------------------------------------------- gradients, in train_step


def norms_of_gradients(wrap: Wrap) -> Any:
    class Logging(Net):
        def change(self, gradients: list[Any]) -> Any:
            logs = {f"norm {i}": tf.norm(g) for i, g in enumerate(gradients)}
            return gradients, {**logs, "all": tf.linalg.global_norm(gradients)}

    return fitted(Logging(), wrap)


def clipped_by_hand(wrap: Wrap) -> Any:
    class Clipping(Net):
        def change(self, gradients: list[Any]) -> Any:
            gradients, norm = tf.clip_by_global_norm(gradients, 0.5)
            return gradients, {"norm": norm}

    return fitted(Clipping(), wrap)


def centred(wrap: Wrap) -> Any:
    class Centring(keras.optimizers.SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
            grads = [_centre(g) for g in grads]
            return super().apply(grads, trainable_variables)

    return fitted(Net(), wrap, Centring(0.1))


def centred_by_separate_losses(wrap: Wrap) -> Any:
    """The same where the loss is compiled."""

    class Centring(keras.optimizers.SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
            grads = [_centre(g) for g in grads]
            return super().apply(grads, trainable_variables)

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(4)]
    model = wrap(keras.Sequential([keras.Input((6,)), *layers]))
    model.compile(Centring(0.1), "mse")
    x, y = data()
    logs = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    return {**logs, "weights": model.get_weights()}


def _centre(gradient: Any) -> Any:
    if len(gradient.shape) < 2:
        return gradient
    return gradient - tf.reduce_mean(gradient, axis=0, keepdims=True)


class Lars(keras.optimizers.SGD):
    """Each gradient scaled by the norm of its weight."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        scaled = []
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            weight, norm = tf.norm(tf.convert_to_tensor(variable)), tf.norm(gradient)
            ratio = tf.where(norm > 0, 0.1 * weight / (norm + 1e-6), 1.0)
            scaled.append(gradient * ratio)
        return super().apply(scaled, trainable_variables)


def lars(wrap: Wrap) -> Any:
    return fitted(Net(), wrap, Lars(0.1, momentum=0.9))


def lars_with_scaled_losses(wrap: Wrap) -> Any:
    class Scaling(Net):
        def train_step(self, batch: Any) -> dict[str, Any]:
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    optimizer = keras.optimizers.LossScaleOptimizer(Lars(0.1), initial_scale=64.0)
    return fitted(Scaling(), wrap, optimizer)


def surgery(wrap: Wrap) -> Any:
    """Two losses, whose gradients are projected onto each other."""

    class Surgery(Net):
        def train_step(self, batch: Any) -> dict[str, Any]:
            x, y = batch
            with tf.GradientTape(persistent=True) as tape:
                outputs = self(x, training=True)
                first, second = tf.reduce_mean((outputs - y) ** 2), tf.reduce_mean(outputs)
            weights = self.trainable_variables
            pairs = zip(tape.gradient(first, weights), tape.gradient(second, weights), strict=True)
            changed = []
            for a, b in pairs:
                overlap = tf.reduce_sum(a * b) / (tf.reduce_sum(b * b) + 1e-6)
                changed.append(a - tf.minimum(overlap, 0.0) * b)
            self.optimizer.apply_gradients(zip(changed, weights, strict=True))
            return {"loss": first}

    return fitted(Surgery(), wrap)


def accumulated_with_norms(wrap: Wrap) -> Any:
    class Logging(Net):
        def change(self, gradients: list[Any]) -> Any:
            return gradients, {"all": tf.linalg.global_norm(gradients)}

    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, global_clipnorm=1.0)
    return fitted(Logging(), wrap, optimizer)


def norms_of_slots(wrap: Wrap) -> Any:
    class Logging(Net):
        def after(self) -> dict[str, Any]:
            return {"slots": tf.add_n([tf.norm(m.value) for m in self.optimizer.momentums])}

    return fitted(Logging(), wrap, keras.optimizers.SGD(0.1, momentum=0.9))


def embeddings(wrap: Wrap) -> Any:
    """Gradients that consist of rows, and their norms."""

    class Words(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            keras.utils.set_random_seed(1)
            self.table = keras.layers.Embedding(10, 6)
            self.b = keras.layers.Dense(8, "tanh")
            self.c = keras.layers.Embedding(9, 4)

        def call(self, x: Any) -> Any:
            return self.b(self.table(x)) @ tf.ones([8, 4]) + self.c(x)

        def train_step(self, batch: Any) -> dict[str, Any]:
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                loss += 0.01 * tf.reduce_sum(self.table.embeddings.value**2)
            weights = self.trainable_variables
            gradients = tape.gradient(loss, weights)
            norms = {f"norm {i}": tf.norm(tf.convert_to_tensor(g)) for i, g in enumerate(gradients)}
            clipped, norm = tf.clip_by_global_norm(gradients, 0.7)
            self.optimizer.apply_gradients(zip(clipped, weights, strict=True))
            return {"loss": loss, "norm": norm, **norms}

    model = wrap(Words())
    model.compile(keras.optimizers.SGD(0.1))
    x, (_, y) = np.arange(16).astype("int32") % 9, data()
    logs = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    return {**logs, "weights": model.get_weights()}


PROGRAMS = [
    penalty_by_hand,
    penalty_of_pairs,
    statistics_of_weights,
    weights_before_and_after,
    weights_in_compute_loss,
    weights_in_a_metric,
    weights_in_test_and_predict_steps,
    moving_averages,
    averages_now_and_then,
    norms_of_gradients,
    clipped_by_hand,
    centred,
    centred_by_separate_losses,
    lars,
    lars_with_scaled_losses,
    surgery,
    accumulated_with_norms,
    norms_of_slots,
    embeddings,
]


def check(names: list[str]) -> None:
    """Runs programs with plain Keras and split; all numbers must agree."""
    import opensmp as smp

    faults = []
    for program in PROGRAMS:
        if names and program.__name__ not in names:
            continue
        try:
            expected = tf.nest.flatten(program(lambda model: model))
            received = tf.nest.flatten(program(smp.DistributedModel.from_keras))
        except Exception as error:
            traceback.print_exc()
            faults.append(f"{program.__name__}: {type(error).__name__}: {error}")
            continue
        for index, (a, b) in enumerate(zip(expected, received, strict=True)):
            if not np.allclose(a, b, rtol=1e-4, atol=1e-5):
                faults.append(f"{program.__name__}, {index}: expected {a}, received {b}")
    assert not faults, "\n".join(faults)


if __name__ == "__main__":
    import opensmp

    opensmp.init()
    check(sys.argv[1:])
