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


def transitions(rows=12, seed=0):
    """States, actions, rewards, next states, ends."""
    rng = np.random.default_rng(seed)
    kind = keras.config.floatx()
    return (
        points(rows, 4, seed),
        rng.integers(0, 3, rows).astype("int32"),
        rng.normal(size=rows).astype(kind),
        points(rows, 4, seed + 100),
        (rng.uniform(size=rows) < 0.2).astype(kind),
    )


@program("smp.step")
def dqn(wrap):
    """DQN with a target network that follows by set_weights and by moving averages."""
    online, target = wrap(mlp(4, 8, 8, 3)), wrap(mlp(4, 8, 8, 3))
    optimizer = keras.optimizers.Adam(0.01, clipnorm=1.0)
    huber = keras.losses.Huber()

    @wrap.step
    def forward_backward(state, action, reward, following, end):
        best = tf.reduce_max(target(following), axis=1)
        goal = tf.stop_gradient(reward + 0.9 * (1 - end) * best)
        with tf.GradientTape() as tape:
            chosen = tf.reduce_sum(online(state) * tf.one_hot(action, 3, dtype=state.dtype), axis=1)
            loss = huber(goal, chosen)
        return tape.gradient(loss, online.trainable_variables), loss

    @tf.function
    def train(*batch):
        gradients, loss = forward_backward(*batch)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, online.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    online(tf.constant(points(2, 4)))
    target(tf.constant(points(2, 4)))
    target.set_weights(online.get_weights())
    losses = []
    for episode in range(4):
        batch = wrap.shard(*transitions(seed=episode))
        losses.append(float(train(*map(tf.constant, batch))))
        for slow, fast in zip(target.weights, online.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
    target.set_weights(online.get_weights())
    return {"losses": losses, "weights": sums(online, target)}


@program("fit")
def dqn_by_batches(wrap):
    """Double DQN with predict, train_on_batch and set_weights, as it is often written."""
    online, target = wrap(mlp(4, 8, 8, 3)), wrap(mlp(4, 8, 8, 3))
    for model in (online, target):
        model.compile(keras.optimizers.SGD(0.05), "huber")
    target.set_weights(online.get_weights())
    losses = []
    for episode in range(3):
        state, action, reward, following, end = transitions(seed=episode)
        q = online.predict_on_batch(state)
        best = online.predict_on_batch(following).argmax(axis=1)
        later = target.predict_on_batch(following)[np.arange(12), best]
        q[np.arange(12), action] = reward + 0.9 * (1 - end) * later
        losses.append(online.train_on_batch(state, q))
        if episode == 1:
            target.set_weights(online.get_weights())
    return {"losses": losses, "weights": sums(online, target)}


def actor_and_critic():
    inputs = keras.Input((4,))
    trunk = keras.layers.Dense(8, activation="tanh")(inputs)
    trunk = keras.layers.Dense(8, activation="tanh")(trunk)
    return keras.Model(inputs, [keras.layers.Dense(3)(trunk), keras.layers.Dense(1)(trunk)])


@program("smp.step")
def actor_critic(wrap):
    """Actor and critic on one trunk, with returns of an episode."""
    model = wrap(actor_and_critic())
    optimizer = keras.optimizers.Adam(0.01)

    @wrap.step
    def forward_backward(state, action, returns):
        with tf.GradientTape() as tape:
            logits, value = model(state, training=True)
            value = tf.squeeze(value, axis=1)
            logs = tf.reduce_sum(
                tf.nn.log_softmax(logits) * tf.one_hot(action, 3, dtype=state.dtype), axis=1
            )
            actor = -tf.reduce_mean(logs * tf.stop_gradient(returns - value))
            critic = tf.reduce_mean(tf.square(returns - value))
            loss = actor + 0.5 * critic
        return tape.gradient(loss, model.trainable_variables), actor, critic

    @tf.function
    def train(*batch):
        gradients, actor, critic = forward_backward(*batch)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(actor.reduce_mean()), wrap.allreduce(critic.reduce_mean())

    losses = []
    for episode in range(3):
        batch = wrap.shard(*transitions(seed=episode)[:3])
        losses.append([float(value) for value in train(*map(tf.constant, batch))])
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def actor_critic_with_two_optimizers(wrap):
    """Actor and critic on one trunk: one forward pass, the critic moves first."""

    class Agent(keras.Model):
        def __init__(self):
            super().__init__()
            self.trunk = keras.layers.Dense(8, activation="tanh")
            self.policy, self.value = keras.layers.Dense(3), keras.layers.Dense(1)

        def compile(self, actor, critic):
            super().compile()
            self.actor_optimizer, self.critic_optimizer = actor, critic

        def call(self, state):
            x = self.trunk(state)
            return self.policy(x), self.value(x)[:, 0]

        def train_step(self, data):
            state, (action, returns) = data
            with tf.GradientTape(persistent=True) as tape:
                logits, value = self(state, training=True)
                advantage = returns - value
                logs = ops.sum(ops.log_softmax(logits) * ops.one_hot(action, 3), axis=1)
                actor = -ops.mean(logs * ops.stop_gradient(advantage))
                critic = ops.mean(advantage**2)
            of_critic = self.trunk.trainable_variables + self.value.trainable_variables
            of_actor = self.trunk.trainable_variables + self.policy.trainable_variables
            self.critic_optimizer.apply(tape.gradient(critic, of_critic), of_critic)
            self.actor_optimizer.apply(tape.gradient(actor, of_actor), of_actor)
            return {"actor": actor, "critic": critic}

    model = wrap(Agent())
    model.compile(keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.5))
    state, action, returns, *_ = transitions(24)
    history = model.fit(
        state, (action, returns), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def ppo(wrap):
    """PPO: the clipped ratio to the probabilities before, with entropy."""

    class Ppo(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = actor_and_critic()

        def call(self, state):
            logits, value = self.net(state)
            return ops.log_softmax(logits), value[:, 0]

        def train_step(self, data):
            state, taken = data
            chosen = ops.one_hot(taken["action"], 3)
            with tf.GradientTape() as tape:
                logs, value = self(state, training=True)
                ratio = ops.exp(ops.sum(logs * chosen, axis=1) - taken["before"])
                gain = taken["returns"] - taken["value"]
                gain = (gain - ops.mean(gain)) / (ops.std(gain) + 1e-8)
                surrogate = ops.minimum(ratio * gain, ops.clip(ratio, 0.8, 1.2) * gain)
                entropy = -ops.mean(ops.sum(ops.exp(logs) * logs, axis=1))
                loss = -ops.mean(surrogate) + 0.5 * ops.mean((value - taken["returns"]) ** 2)
                loss -= 0.01 * entropy
            gradients = tape.gradient(loss, self.trainable_variables)
            gradients, norm = tf.clip_by_global_norm(gradients, 0.5)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss, "entropy": entropy, "norm": norm}

    model = wrap(Ppo())
    model.compile(keras.optimizers.Adam(0.02))
    history = []
    for episode in range(2):
        state, action, returns, *_ = transitions(24, seed=episode)
        logs, value = model.predict(state, batch_size=12, verbose=0)
        before = logs[np.arange(24), action]
        taken = {"action": action, "returns": returns, "before": before, "value": value}
        history.append(
            model.fit(state, taken, batch_size=12, epochs=2, shuffle=False, verbose=0).history
        )
    return {"history": history, "weights": sums(model)}


@program("fit")
def reinforce(wrap):
    """REINFORCE: fit with returns as sample weights."""
    model = wrap(mlp(4, 8, 3))
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    losses = []
    for episode in range(3):
        state, action, returns, *_ = transitions(24, seed=episode)
        losses.append(
            model.fit(
                state, action, sample_weight=returns, batch_size=24, shuffle=False, verbose=0
            ).history
        )
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def soft_actor_critic(wrap):
    """Two critics with slow copies, and an actor that goes through them."""

    class Sac(keras.Model):
        def __init__(self):
            super().__init__()
            self.actor = mlp(4, 8, 2)
            self.critics = [mlp(6, 8, 1), mlp(6, 8, 1)]
            self.slow = [keras.models.clone_model(critic) for critic in self.critics]
            for slow, critic in zip(self.slow, self.critics, strict=True):
                slow.set_weights(critic.get_weights())

        def compile(self, actor, critic):
            super().compile()
            self.of_actor, self.of_critic = actor, critic

        def judge(self, critics, state, action):
            seen = ops.concatenate([state, action], axis=-1)
            return [critic(seen)[:, 0] for critic in critics]

        def train_step(self, data):
            (state, action, following), reward = data
            later = self.judge(self.slow, following, ops.tanh(self.actor(following)))
            goal = ops.stop_gradient(reward + 0.9 * ops.minimum(*later))
            weights = [w for critic in self.critics for w in critic.trainable_variables]
            with tf.GradientTape() as tape:
                found = self.judge(self.critics, state, action)
                critic_loss = sum(ops.mean((value - goal) ** 2) for value in found)
            self.of_critic.apply(tape.gradient(critic_loss, weights), weights)
            weights = self.actor.trainable_variables
            with tf.GradientTape() as tape:
                found = self.judge(self.critics, state, ops.tanh(self.actor(state)))
                actor_loss = -ops.mean(ops.minimum(*found))
            self.of_actor.apply(tape.gradient(actor_loss, weights), weights)
            for slow, critic in zip(self.slow, self.critics, strict=True):
                for mean, weight in zip(slow.variables, critic.variables, strict=True):
                    mean.assign(0.9 * mean + 0.1 * weight)
            return {"critic": critic_loss, "actor": actor_loss}

    model = wrap(Sac())
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02))
    state, _, reward, following, _ = transitions(24)
    history = model.fit(
        (state, points(24, 2, seed=7), following), reward, batch_size=12, epochs=2,
        shuffle=False, verbose=0,
    ).history  # fmt: skip
    return {"history": history, "weights": sums(model)}
