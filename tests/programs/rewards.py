"""Programs that learn from rewards."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import mlp, points, sums
from programs.registry import READ_EAGERLY, program


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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


@program("smp.step", refused=READ_EAGERLY)
def dqn(wrap):
    """DQN with a target network that follows by set_weights and by moving averages."""
    return dqn_following(
        wrap, lambda target, online: zip(target.weights, online.weights, strict=True)
    )


@program("smp.step")
def dqn_of_local_variables(wrap):
    """DQN whose target network follows in a loop over `smp.local_variables`."""
    return dqn_following(wrap, wrap.local_pairs)


def dqn_following(wrap, pairs):
    """DQN.

    Args:
        wrap: Splits models.
        pairs: Takes the target network and the other; gives pairs of their weights.
    """
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
        for slow, fast in pairs(target, online):
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
