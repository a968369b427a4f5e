"""Programs with adversarial examples and with gradients that are turned round."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.registry import program


class Attacked(keras.Model):
    """A classifier that is trained on examples made against it."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.more = keras.layers.Dense(8, activation="tanh")
        self.logits = keras.layers.Dense(4)

    def call(self, x):
        return self.logits(self.more(self.hidden(x)))

    def train_step(self, data):
        x, y = data
        attacked = x
        for _ in range(self.times):
            with tf.GradientTape() as tape:
                tape.watch(attacked)
                loss = self.compute_loss(x=x, y=y, y_pred=self(attacked, training=True))
            attacked += 0.1 * ops.sign(tape.gradient(loss, attacked))
            attacked = ops.clip(attacked, x - 0.15, x + 0.15)
        attacked = ops.stop_gradient(attacked)
        with tf.GradientTape() as tape:
            y_pred = self(attacked, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            loss = 0.5 * (loss + self.compute_loss(x=x, y=y, y_pred=self(x, training=True)))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(x, y, y_pred) | {"total": loss}


def attack(wrap, times):
    model = wrap(Attacked(times))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.2), loss, metrics=["accuracy"])
    x, y = points(24), labels(24)
    history = model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "scores": model.evaluate(x, y, verbose=0), "weights": sums(model)}


@program("train_step")
def fgsm(wrap):
    """Adversarial training with the sign of the gradient (FGSM)."""
    return attack(wrap, times=1)


@program("train_step")
def pgd(wrap):
    """Adversarial training with several steps of the attack (PGD)."""
    return attack(wrap, times=3)


@program("smp.step")
def fgsm_by_steps(wrap):
    """Adversarial training with the sign of the gradient in a loop of one's own."""
    model = wrap(mlp(6, 8, 8, 4))
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(0.01)

    @wrap.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_fn(y, model(x, training=True))
        attacked = tf.stop_gradient(x + 0.1 * tf.sign(tape.gradient(loss, x)))
        with tf.GradientTape() as tape:
            logits = model(attacked, training=True)
            loss = loss_fn(y, logits)
        return tape.gradient(loss, model.trainable_variables), loss, logits

    @tf.function
    def train(x, y):
        gradients, loss, logits = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean()), logits.merge()

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    found = [train(x, y) for _ in range(3)]
    return {
        "losses": [float(loss) for loss, _ in found],
        "logits": wrap.unshard(found[-1][1]),
        "weights": sums(model),
    }


@keras.saving.register_keras_serializable("programs")
class Reversal(keras.layers.Layer):
    """The identity, whose gradient has the other sign."""

    def call(self, x):
        @tf.custom_gradient
        def reverse(x):
            return tf.identity(x), lambda gradient: -0.3 * gradient

        return reverse(x)


@program("fit")
def domain_adversarial(wrap):
    """Domain adaptation with a layer that turns gradients round, and two heads."""
    inputs = keras.Input((6,))
    features = keras.layers.Dense(8, activation="tanh")(inputs)
    label = keras.layers.Dense(4, activation="softmax", name="label")(features)
    domain = keras.layers.Dense(8, activation="tanh")(Reversal()(features))
    domain = keras.layers.Dense(1, activation="sigmoid", name="domain")(domain)
    model = wrap(keras.Model(inputs, {"label": label, "domain": domain}))
    model.compile(
        keras.optimizers.SGD(0.2, momentum=0.9),
        {"label": "sparse_categorical_crossentropy", "domain": "binary_crossentropy"},
        loss_weights={"label": 1.0, "domain": 0.5},
    )
    truth = {"label": labels(24), "domain": labels(24, 2, seed=5)}
    known = {"label": (truth["domain"] == 0) * 1.0, "domain": points(24, 1)[:, 0] ** 2}
    history = model.fit(
        points(24), truth, sample_weight=known, batch_size=12, epochs=3, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}
