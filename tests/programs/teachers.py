"""Programs in which one network teaches another one, and programs that learn from rewards."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, points, sums
from programs.registry import program


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@program("train_step")
def distillation(wrap):
    """Distillation: a class that calls teacher and student, after the teacher was trained."""

    class Distiller(keras.Model):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher

        def compile(self, optimizer, metrics, student_loss, soft_loss, alpha, temperature):
            super().compile(optimizer=optimizer, metrics=metrics)
            self.student_loss, self.soft_loss = student_loss, soft_loss
            self.alpha, self.temperature = alpha, temperature

        def train_step(self, data):
            x, y = data
            goals = self.teacher(x, training=False)
            with tf.GradientTape() as tape:
                logits = self.student(x, training=True)
                hard = self.student_loss(y, logits)
                soft = self.soft_loss(
                    ops.softmax(goals / self.temperature), ops.softmax(logits / self.temperature)
                )
                loss = self.alpha * hard + (1 - self.alpha) * soft * self.temperature**2
            weights = self.student.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            self.compute_metrics(x, y, logits, sample_weight=None)
            return {m.name: m.result() for m in self.metrics} | {"hard": hard, "soft": soft}

        def test_step(self, data):
            x, y = data
            logits = self.student(x, training=False)
            return {"hard": self.student_loss(y, logits)}

    teacher = wrap(mlp(6, 16, 16, 4))
    teacher.compile(keras.optimizers.Adam(0.01), crossentropy(), metrics=["accuracy"])
    x, y = points(24), labels(24)
    first = teacher.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    distiller = wrap(Distiller(mlp(6, 8, 4), teacher))
    distiller.compile(
        keras.optimizers.Adam(0.01), None, crossentropy(), keras.losses.KLDivergence(), 0.3, 3.0
    )
    second = distiller.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    scores = distiller.evaluate(x, y, batch_size=12, verbose=0, return_dict=True)
    return {"first": first, "second": second, "scores": scores, "weights": sums(distiller)}


@program("smp.step")
def distillation_by_steps(wrap):
    """Distillation of two split models in a loop of one's own."""
    teacher, student = wrap(mlp(6, 16, 16, 4)), wrap(mlp(6, 8, 4))
    optimizer, loss_fn = keras.optimizers.SGD(0.1), crossentropy()

    @wrap.step
    def forward_backward(x, y):
        goals = tf.nn.softmax(teacher(x, training=False) / 2.0)
        with tf.GradientTape() as tape:
            logits = student(x, training=True)
            loss = loss_fn(y, logits)
            loss += tf.reduce_mean(keras.losses.kl_divergence(goals, tf.nn.softmax(logits / 2.0)))
        return tape.gradient(loss, student.trainable_variables), loss

    @tf.function
    def train(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, student.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    x, y = map(tf.constant, wrap.shard(points(), labels()))
    losses = [float(train(x, y)) for _ in range(3)]
    return {"losses": losses, "weights": sums(student, teacher)}


@program("train_step")
def mean_teacher(wrap):
    """Mean teacher: labelled rows, and agreement with a slow copy on all rows."""

    class MeanTeacher(keras.Model):
        def __init__(self):
            super().__init__()
            self.student = mlp(6, 8, 8, 4)
            self.teacher = keras.models.clone_model(self.student)
            self.teacher.set_weights(self.student.get_weights())
            self.teacher.trainable = False
            self.seeds = keras.random.SeedGenerator(2)

        def call(self, x, training=False):
            return self.student(x, training=training)

        def train_step(self, data):
            x, y = data
            noisy = x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seeds)
            goals = ops.softmax(self.teacher(noisy, training=False))
            known = ops.cast(y >= 0, x.dtype)
            with tf.GradientTape() as tape:
                logits = self.student(x, training=True)
                errors = keras.losses.sparse_categorical_crossentropy(
                    ops.maximum(y, 0), logits, from_logits=True
                )
                agreement = ops.mean((ops.softmax(logits) - goals) ** 2)
                loss = ops.sum(errors * known) / ops.maximum(ops.sum(known), 1.0) + agreement
            weights = self.student.trainable_weights
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            for slow, fast in zip(self.teacher.weights, self.student.weights, strict=True):
                slow.assign(0.9 * slow + 0.1 * fast)
            return {"loss": loss, "agreement": agreement}

    model = wrap(MeanTeacher())
    model.compile(keras.optimizers.SGD(0.2, momentum=0.9))
    y = np.where(np.arange(24) % 3 == 0, labels(24), -1)
    history = model.fit(points(24), y, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {
        "history": history,
        "teacher": model.teacher.predict(points(), verbose=0),
        "weights": sums(model),
    }


@program("fit")
def pseudo_labels(wrap):
    """Self-training: predictions become labels between two fits."""
    model = wrap(mlp(6, 8, 8, 4))
    model.compile(keras.optimizers.SGD(0.2), crossentropy(), metrics=["accuracy"])
    x, y, more = points(12), labels(12), points(24, seed=5)
    histories = [model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history]
    for _ in range(2):
        found = model.predict(more, batch_size=8, verbose=0)
        sure = np.argsort(-found.max(axis=1))[:12]
        both = np.concatenate([x, more[sure]]), np.concatenate([y, found[sure].argmax(axis=1)])
        histories.append(model.fit(*both, batch_size=8, shuffle=False, verbose=0).history)
    return {"histories": histories, "weights": sums(model)}


@program("fit")
def born_again(wrap):
    """A copy by clone_model and set_weights is trained on the outputs of the first model."""
    first = wrap(mlp(6, 8, 8, 4))
    first.compile(keras.optimizers.SGD(0.2), "mse")
    x = points(24)
    history = first.fit(x, points(24, 4, seed=1), batch_size=12, shuffle=False, verbose=0).history
    copy = keras.models.clone_model(mlp(6, 8, 8, 4))
    copy.set_weights(first.get_weights())
    second = wrap(copy)
    second.compile(keras.optimizers.SGD(0.2), "mse")
    again = second.fit(
        x + 0.1, first.predict(x, verbose=0), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "again": again, "weights": sums(first, second)}


@program("fit")
def averaged_weights(wrap):
    """Stochastic weight averaging: a callback averages get_weights and sets them at the end."""

    class Average(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.found = []

        def on_epoch_end(self, epoch, logs=None):
            if epoch >= 1:
                self.found.append(self.model.get_weights())

        def on_train_end(self, logs=None):
            means = [np.mean(each, axis=0) for each in zip(*self.found, strict=True)]
            self.model.set_weights(means)

    model = wrap(mlp(6, 8, 4))
    model.compile(keras.optimizers.SGD(0.5), crossentropy())
    x, y = points(24), labels(24)
    history = model.fit(
        x, y, batch_size=12, epochs=4, shuffle=False, verbose=0, callbacks=[Average()]
    ).history
    return {"history": history, "score": model.evaluate(x, y, verbose=0), "weights": sums(model)}
