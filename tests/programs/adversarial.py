"""Programs with adversaries: GANs, adversarial examples, gradient reversal."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import images, mlp, only_x, points, sums
from programs.registry import program

LATENT = 4


def crossentropy():
    return keras.losses.BinaryCrossentropy(from_logits=True)


class Gan(keras.Model):
    """The class as it stands in tutorials: it calls its parts, never itself."""

    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.seeds = keras.random.SeedGenerator(7)
        self.d_loss = keras.metrics.Mean(name="d_loss")
        self.g_loss = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    @property
    def metrics(self):
        return [self.d_loss, self.g_loss]

    def train_step(self, data):
        real = only_x(data)
        rows = ops.shape(real)[0]
        noise = keras.random.normal((rows, LATENT), seed=self.seeds)
        both = ops.concatenate([self.generator(noise), real], axis=0)
        truth = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(truth, self.discriminator(both))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(
            zip(gradients, self.discriminator.trainable_weights, strict=True)
        )
        noise = keras.random.normal((rows, LATENT), seed=self.seeds)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((rows, 1)), self.discriminator(self.generator(noise)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(
            zip(gradients, self.generator.trainable_weights, strict=True)
        )
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


@program("train_step")
def gan_joint(wrap):
    """GAN whose class calls generator and discriminator."""
    gan = wrap(Gan(mlp(6, 8, 1), mlp(LATENT, 8, 6)))
    gan.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1), crossentropy())
    history = gan.fit(points(24), batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(gan)}


@program("train_step")
def gan_of_convolutions(wrap):
    """GAN of convolutions that makes pictures."""
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, strides=2, padding="same"),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((LATENT,)),
            keras.layers.Dense(16),
            keras.layers.Reshape((4, 4, 1)),
            keras.layers.Conv2DTranspose(4, 4, strides=2, padding="same"),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    gan = wrap(Gan(discriminator, generator))
    gan.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01), crossentropy())
    history = gan.fit(images(), batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {
        "history": history,
        "weights": sums(gan),
        "pictures": gan.generator.predict(points(4, LATENT), verbose=0),
    }


@program("smp.step")
def gan_by_steps(wrap):
    """GAN of two models that are split by themselves, with two optimizers."""
    discriminator, generator = wrap(mlp(6, 8, 1)), wrap(mlp(LATENT, 8, 6))
    d_optimizer, g_optimizer = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2)
    loss = crossentropy()

    @wrap.step
    def discriminate(real, noise):
        with tf.GradientTape() as tape:
            right, wrong = discriminator(real), discriminator(generator(noise))
            value = loss(tf.ones_like(right), right) + loss(tf.zeros_like(wrong), wrong)
        return tape.gradient(value, discriminator.trainable_variables), value

    @wrap.step
    def generate(noise):
        with tf.GradientTape() as tape:
            wrong = discriminator(generator(noise))
            value = loss(tf.ones_like(wrong), wrong)
        return tape.gradient(value, generator.trainable_variables), value

    @tf.function
    def train(real, noise):
        gradients, d_loss = discriminate(real, noise)
        gradients = [wrap.allreduce(g.accumulate()) for g in gradients]
        d_optimizer.apply_gradients(zip(gradients, discriminator.trainable_variables, strict=True))
        gradients, g_loss = generate(noise)
        gradients = [wrap.allreduce(g.accumulate()) for g in gradients]
        g_optimizer.apply_gradients(zip(gradients, generator.trainable_variables, strict=True))
        return wrap.allreduce(d_loss.reduce_mean()), wrap.allreduce(g_loss.reduce_mean())

    real = tf.constant(wrap.shard(points()))
    losses = []
    for epoch in range(3):
        noise = tf.constant(wrap.shard(points(12, LATENT, seed=epoch)))
        losses.append([float(value) for value in train(real, noise)])
    return {"losses": losses, "weights": sums(discriminator, generator)}


@program("train_step")
def gan_interleaved(wrap):
    """GAN with one forward pass for both: the generator's gradient comes after an update."""

    class Interleaved(Gan):
        def call(self, noise):
            return self.discriminator(self.generator(noise))

        def train_step(self, data):
            real = only_x(data)
            noise = keras.random.normal((ops.shape(real)[0], LATENT), seed=self.seeds)
            with tf.GradientTape(persistent=True) as tape:
                wrong = self(noise)
                right = self.discriminator(real)
                g_loss = self.loss_fn(ops.ones_like(wrong), wrong)
                d_loss = self.loss_fn(ops.ones_like(right), right)
                d_loss += self.loss_fn(ops.zeros_like(wrong), wrong)
            of_d, of_g = self.discriminator.trainable_weights, self.generator.trainable_weights
            self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, of_d), of_d, strict=True))
            self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, of_g), of_g, strict=True))
            self.d_loss.update_state(d_loss)
            self.g_loss.update_state(g_loss)
            return {metric.name: metric.result() for metric in self.metrics}

    gan = wrap(Interleaved(mlp(6, 8, 1), mlp(LATENT, 8, 6)))
    gan.compile(keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.5), crossentropy())
    history = gan.fit(points(), batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(gan)}


@program("train_step")
def wgan_gp(wrap):
    """WGAN with gradient penalty: several steps of the critic for one of the generator."""

    class Wgan(Gan):
        def penalty(self, real, wrong):
            share = keras.random.uniform((ops.shape(real)[0], 1), seed=self.seeds)
            between = real + share * (wrong - real)
            with tf.GradientTape() as tape:
                tape.watch(between)
                score = self.discriminator(between)
            slope = tape.gradient(score, between)
            norm = ops.sqrt(ops.sum(ops.square(slope), axis=1) + 1e-12)
            return ops.mean((norm - 1.0) ** 2)

        def train_step(self, data):
            real = only_x(data)
            rows = ops.shape(real)[0]
            for _ in range(2):
                noise = keras.random.normal((rows, LATENT), seed=self.seeds)
                with tf.GradientTape() as tape:
                    wrong = self.generator(noise, training=True)
                    cost = ops.mean(self.discriminator(wrong)) - ops.mean(self.discriminator(real))
                    d_loss = cost + 10.0 * self.penalty(real, wrong)
                weights = self.discriminator.trainable_weights
                self.d_optimizer.apply_gradients(
                    zip(tape.gradient(d_loss, weights), weights, strict=True)
                )
            noise = keras.random.normal((rows, LATENT), seed=self.seeds)
            with tf.GradientTape() as tape:
                g_loss = -ops.mean(self.discriminator(self.generator(noise)))
            weights = self.generator.trainable_weights
            self.g_optimizer.apply_gradients(
                zip(tape.gradient(g_loss, weights), weights, strict=True)
            )
            self.d_loss.update_state(d_loss)
            self.g_loss.update_state(g_loss)
            return {metric.name: metric.result() for metric in self.metrics}

    gan = wrap(Wgan(mlp(6, 8, 1), mlp(LATENT, 8, 6)))
    gan.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01), None)
    history = gan.fit(points(), batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(gan)}


@program("smp.step")
def wgan_gp_by_steps(wrap):
    """Critic with gradient penalty in a loop of one's own."""
    critic = wrap(mlp(6, 8, 8, 1))
    optimizer = keras.optimizers.SGD(0.05)

    @wrap.step
    def forward_backward(real, wrong, share):
        with tf.GradientTape() as outer:
            between = share * real + (1 - share) * wrong
            with tf.GradientTape() as inner:
                inner.watch(between)
                score = critic(between)
            norm = tf.norm(inner.gradient(score, between), axis=1)
            loss = tf.reduce_mean(critic(wrong)) - tf.reduce_mean(critic(real))
            loss += 10.0 * tf.reduce_mean((norm - 1.0) ** 2)
        return outer.gradient(loss, critic.trainable_variables), loss

    @tf.function
    def train(*data):
        gradients, loss = forward_backward(*data)
        gradients = [None if g is None else wrap.allreduce(g.accumulate()) for g in gradients]
        pairs = zip(gradients, critic.trainable_variables, strict=True)
        optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
        return wrap.allreduce(loss.reduce_mean())

    data = wrap.shard(points(), points(seed=3), abs(points(columns=1)) % 1)
    losses = [float(train(*map(tf.constant, data))) for _ in range(4)]
    return {"losses": losses, "weights": sums(critic)}


@program("train_step")
def wgan_with_clipped_weights(wrap):
    """WGAN whose critic's weights are clipped after each step."""

    class Clipped(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.score = keras.layers.Dense(1)

        def call(self, x):
            return self.score(self.hidden(x))

        def train_step(self, data):
            real, wrong = data
            with tf.GradientTape() as tape:
                loss = ops.mean(self(wrong)) - ops.mean(self(real))
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply(gradients, self.trainable_weights)
            for weight in self.trainable_weights:
                weight.assign(ops.clip(weight, -0.1, 0.1))
            return {"loss": loss}

    critic = wrap(Clipped())
    critic.compile(keras.optimizers.RMSprop(0.01))
    history = critic.fit(
        points(), points(seed=4), batch_size=12, epochs=3, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(critic)}


@program("train_step")
def r1_penalty(wrap):
    """Discriminator with the R1 penalty on real examples."""

    class Regularized(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="softplus")
            self.logit = keras.layers.Dense(1)

        def call(self, x):
            return self.logit(self.hidden(x))

        def train_step(self, data):
            real, wrong = data
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(real)
                    right = self(real, training=True)
                slope = inner.gradient(right, real)
                loss = ops.mean(ops.softplus(self(wrong, training=True)))
                loss += ops.mean(ops.softplus(-right))
                loss += 5.0 * ops.mean(ops.sum(ops.square(slope), axis=-1))
            weights = self.trainable_weights
            self.optimizer.apply_gradients(zip(outer.gradient(loss, weights), weights, strict=True))
            return {"loss": loss, "slope": ops.mean(ops.abs(slope))}

    model = wrap(Regularized())
    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(
        points(), points(seed=4), batch_size=12, epochs=3, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def cycle_gan(wrap):
    """Two generators and two discriminators with a loss on the way there and back."""

    class Cycle(keras.Model):
        def __init__(self):
            super().__init__()
            self.there, self.back = mlp(6, 8, 6), mlp(6, 8, 6)
            self.judge_there, self.judge_back = mlp(6, 8, 1), mlp(6, 8, 1)

        def compile(self, optimizers):
            super().compile()
            self.optimizers = optimizers

        def train_step(self, data):
            a, b = data
            with tf.GradientTape(persistent=True) as tape:
                fake_b, fake_a = self.there(a), self.back(b)
                again_a, again_b = self.back(fake_b), self.there(fake_a)
                score_b, score_a = self.judge_there(fake_b), self.judge_back(fake_a)
                cycle = ops.mean(ops.abs(again_a - a)) + ops.mean(ops.abs(again_b - b))
                g_loss = ops.mean((score_b - 1) ** 2) + ops.mean((score_a - 1) ** 2) + 5 * cycle
                d_there = ops.mean(score_b**2) + ops.mean((self.judge_there(b) - 1) ** 2)
                d_back = ops.mean(score_a**2) + ops.mean((self.judge_back(a) - 1) ** 2)
            steps = [
                (g_loss, self.there.trainable_variables + self.back.trainable_variables),
                (d_there, self.judge_there.trainable_variables),
                (d_back, self.judge_back.trainable_variables),
            ]
            found = [tape.gradient(loss, weights) for loss, weights in steps]
            for optimizer, gradients, (_, weights) in zip(
                self.optimizers, found, steps, strict=True
            ):
                optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return {"g_loss": g_loss, "d_there": d_there, "d_back": d_back, "cycle": cycle}

    model = wrap(Cycle())
    model.compile([keras.optimizers.SGD(0.05) for _ in range(3)])
    history = model.fit(
        points(), points(seed=6), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}
