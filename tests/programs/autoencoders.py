"""Programs that learn to make what they are given: autoencoders, diffusion."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import images, mlp, only_x, points, sums
from programs.registry import Apart, program

CODEBOOK = {
    "2 x 2": Apart(
        "each replica moves a codebook of its own, and a warning names it",
        says="is assigned once per microbatch",
    )
}


class Sampling(keras.layers.Layer):
    """Draws from a normal distribution, with a seed of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(11)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        return mean + ops.exp(0.5 * log_variance) * noise


def encoder():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    mean = keras.layers.Dense(2, name="mean")(x)
    log_variance = keras.layers.Dense(2, name="log_variance")(x)
    return keras.Model(inputs, [mean, log_variance], name="encoder")


def divergence(mean, log_variance):
    return -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=1)


class Vae(keras.Model):
    """The class as it stands in tutorials: it calls encoder and decoder."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.seeds = keras.random.SeedGenerator(3)
        self.total = keras.metrics.Mean(name="loss")
        self.kl = keras.metrics.Mean(name="kl")

    @property
    def metrics(self):
        return [self.total, self.kl]

    def train_step(self, data):
        x = only_x(data)
        with tf.GradientTape() as tape:
            mean, log_variance = self.encoder(x)
            noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
            again = self.decoder(mean + ops.exp(0.5 * log_variance) * noise)
            kl = ops.mean(divergence(mean, log_variance))
            loss = ops.mean(ops.sum(ops.square(again - x), axis=1)) + kl
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total.update_state(loss)
        self.kl.update_state(kl)
        return {metric.name: metric.result() for metric in self.metrics}


@program("train_step")
def vae_of_parts(wrap):
    """VAE whose class calls encoder and decoder."""
    vae = wrap(Vae(encoder(), mlp(2, 8, 6)))
    vae.compile(optimizer=keras.optimizers.Adam(0.01))
    history = vae.fit(points(24), batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {
        "history": history,
        "weights": sums(vae),
        "pictures": vae.decoder.predict(points(4, 2), verbose=0),
    }


@program(
    "fit",
    microbatches=1,
    why="each microbatch draws noise of its own",
    apart={"2 x 2": Apart("each replica draws noise for its own rows")},
)
def vae_as_one_model(wrap):
    """VAE as one Functional model, whose sampling layer adds the divergence as a loss."""

    class Divergence(Sampling):
        def call(self, inputs):
            self.add_loss(0.1 * ops.mean(divergence(*inputs)))
            return super().call(inputs)

    parts = encoder()
    vae = wrap(keras.Model(parts.input, mlp(2, 8, 6)(Divergence()(parts.output))))
    vae.compile("adam", "mse")
    x = points(12)
    history = vae.fit(x, x, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(vae)}


@program("fit")
def sparse_autoencoder(wrap):
    """Autoencoder that adds a loss for each example, without noise."""

    class Sparse(keras.layers.Layer):
        def call(self, x):
            self.add_loss(0.01 * ops.sum(ops.abs(x), axis=-1))
            return x

    inputs = keras.Input((6,))
    code = Sparse()(keras.layers.Dense(8, activation="relu")(inputs))
    model = wrap(keras.Model(inputs, keras.layers.Dense(6)(code)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = points(24)
    history = model.fit(x, x, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "scores": model.evaluate(x, x, verbose=0), "weights": sums(model)}


class Codebook(keras.layers.Layer):
    """Nearest entries of a table, straight through for gradients."""

    def __init__(self, moving=False, **kwargs):
        super().__init__(**kwargs)
        self.moving = moving

    def build(self, shape):
        self.table = self.add_weight(
            shape=(5, shape[-1]), initializer="random_normal", trainable=not self.moving
        )
        if self.moving:
            self.counts = self.add_weight(shape=(5,), initializer="ones", trainable=False)
            self.totals = self.add_weight(
                shape=(5, shape[-1]), initializer="random_normal", trainable=False
            )

    def call(self, x, training=False):
        table = ops.convert_to_tensor(self.table)
        distances = ops.sum((x[:, None] - table[None]) ** 2, axis=-1)
        chosen = ops.one_hot(ops.argmin(distances, axis=-1), 5, dtype=x.dtype)
        entry = ops.matmul(chosen, table)
        self.add_loss(0.25 * ops.mean((ops.stop_gradient(entry) - x) ** 2))
        if self.moving and training:
            self.counts.assign(0.9 * self.counts + 0.1 * ops.sum(chosen, axis=0))
            self.totals.assign(0.9 * self.totals + 0.1 * ops.matmul(ops.transpose(chosen), x))
            self.table.assign(self.totals / self.counts[:, None])
        elif not self.moving:
            self.add_loss(ops.mean((entry - ops.stop_gradient(x)) ** 2))
        return x + ops.stop_gradient(entry - x)


def quantized(wrap, moving):
    inputs = keras.Input((6,))
    code = Codebook(moving)(keras.layers.Dense(3)(inputs))
    model = wrap(keras.Model(inputs, mlp(3, 8, 6)(code)))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = points(24)
    history = model.fit(x, x, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {
        "history": history,
        "predictions": model.predict(x, batch_size=12, verbose=0),
        "weights": sums(model),
    }


@program("fit")
def vq_vae(wrap):
    """VQ-VAE whose codebook is trained by a loss that its layer adds."""
    return quantized(wrap, moving=False)


@program("fit", microbatches=1, why="the codebook moves once per microbatch", apart=CODEBOOK)
def vq_vae_with_moving_codebook(wrap):
    """VQ-VAE whose codebook is a moving average."""
    return quantized(wrap, moving=True)


@program("smp.step", apart=CODEBOOK)
def vq_vae_with_moving_codebook_by_steps(wrap):
    """VQ-VAE whose codebook moves once per microbatch, as in a loop over them."""
    inputs = keras.Input((6,))
    code = Codebook(moving=True)(keras.layers.Dense(3)(inputs))
    model = wrap(keras.Model(inputs, mlp(3, 8, 6)(code)))
    optimizer = keras.optimizers.SGD(0.1)

    @wrap.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - x) ** 2) + sum(model.losses)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x):
        gradients, loss = forward_backward(x)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    x = tf.constant(wrap.shard(points()))
    losses = [float(train(x)) for _ in range(3)]
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def denoising_autoencoder(wrap):
    """Autoencoder whose train_step adds the noise and calls Keras' own."""

    class Denoising(keras.Model):
        def __init__(self):
            super().__init__()
            self.down = keras.layers.Conv2D(4, 3, padding="same", activation="relu")
            self.up = keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")
            self.seeds = keras.random.SeedGenerator(5)

        def call(self, x):
            return self.up(self.down(x))

        def train_step(self, data):
            clean = only_x(data)
            noise = 0.1 * keras.random.normal(ops.shape(clean), seed=self.seeds)
            return super().train_step((clean + noise, clean))

    model = wrap(Denoising())
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["mae"])
    x = images(24)
    history = model.fit(x, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "predictions": model.predict(x, verbose=0), "weights": sums(model)}


@program("train_step")
def diffusion(wrap):
    """Diffusion model with a moving average of its network, which makes the pictures."""

    class Diffusion(keras.Model):
        def __init__(self):
            super().__init__()
            self.network = mlp(8, 12, 12, 6)
            self.average = keras.models.clone_model(self.network)
            self.average.set_weights(self.network.get_weights())
            self.average.trainable = False
            self.seeds = keras.random.SeedGenerator(9)
            self.loss_of_noise = keras.metrics.Mean(name="noise")

        @property
        def metrics(self):
            return [self.loss_of_noise]

        def rates(self, times):
            angle = 0.1 + times * 1.4
            return ops.cos(angle), ops.sin(angle)

        def denoise(self, noisy, noise_rate, signal_rate, training):
            network = self.network if training else self.average
            seen = ops.concatenate([noisy, noise_rate**2, signal_rate**2], axis=1)
            noise = network(seen, training=training)
            return noise, (noisy - noise_rate * noise) / signal_rate

        def train_step(self, data):
            x = only_x(data)
            rows = ops.shape(x)[0]
            noise = keras.random.normal((rows, 6), seed=self.seeds)
            signal_rate, noise_rate = self.rates(keras.random.uniform((rows, 1), seed=self.seeds))
            noisy = signal_rate * x + noise_rate * noise
            with tf.GradientTape() as tape:
                found, _ = self.denoise(noisy, noise_rate, signal_rate, training=True)
                loss = self.loss(noise, found)
            gradients = tape.gradient(loss, self.network.trainable_weights)
            self.optimizer.apply_gradients(
                zip(gradients, self.network.trainable_weights, strict=True)
            )
            self.loss_of_noise.update_state(loss)
            for weight, mean in zip(self.network.weights, self.average.weights, strict=True):
                mean.assign(0.9 * mean + 0.1 * weight)
            return {"noise": self.loss_of_noise.result()}

    model = wrap(Diffusion())
    model.compile(keras.optimizers.Adam(0.01), loss=keras.losses.MeanAbsoluteError())
    history = model.fit(points(24), batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {
        "history": history,
        "average": model.average.predict(points(4, 8), verbose=0),
        "weights": sums(model),
    }


@program("train_step")
def vae_with_growing_divergence(wrap):
    """VAE in whose loss a callback makes the divergence grow."""

    class Growing(Vae):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.share = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            mean, log_variance = self.encoder(x)
            return self.decoder(mean), mean, log_variance

        def train_step(self, data):
            x = only_x(data)
            with tf.GradientTape() as tape:
                again, mean, log_variance = self(x, training=True)
                kl = ops.mean(divergence(mean, log_variance))
                loss = ops.mean(ops.sum(ops.square(again - x), axis=1)) + self.share * kl
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            self.total.update_state(loss)
            self.kl.update_state(kl)
            return {metric.name: metric.result() for metric in self.metrics}

    class Grow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.share.assign(0.5 * epoch)

    vae = wrap(Growing(encoder(), mlp(2, 8, 6)))
    vae.compile(optimizer=keras.optimizers.Adam(0.01))
    history = vae.fit(
        points(24), batch_size=12, epochs=3, shuffle=False, verbose=0, callbacks=[Grow()]
    ).history
    return {"history": history, "weights": sums(vae)}


@program("train_step")
def masked_autoencoder(wrap):
    """Transformer that learns to fill in the patches that were left out."""

    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = keras.layers.Dense(8)
            self.attention = keras.layers.MultiHeadAttention(2, 4)
            self.norm = keras.layers.LayerNormalization()
            self.out = keras.layers.Dense(4)
            self.seeds = keras.random.SeedGenerator(13)

        def build(self, shape):
            self.mask_token = self.add_weight(shape=(1, 1, 8), initializer="random_normal")
            self.positions = self.add_weight(shape=(1, 16, 8), initializer="random_normal")

        def call(self, inputs):
            patches, kept = inputs
            x = self.embed(patches)
            x = ops.where(kept[:, :, None] > 0.5, x, self.mask_token) + self.positions
            return self.out(self.norm(x + self.attention(x, x)))

        def train_step(self, data):
            patches = only_x(data)
            draws = keras.random.uniform(ops.shape(patches)[:2], seed=self.seeds)
            kept = ops.cast(draws < 0.5, patches.dtype)
            with tf.GradientTape() as tape:
                errors = ops.mean((self((patches, kept)) - patches) ** 2, axis=-1)
                loss = ops.sum(errors * (1 - kept)) / ops.sum(1 - kept)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    patches = images(12).reshape(12, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(12, 16, 4)
    model = wrap(Masked())
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(patches, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("smp.step")
def autoencoder_with_batch_normalization(wrap):
    """Autoencoder with batch normalization, in a loop over the microbatches."""
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization(momentum=0.8)(keras.layers.Dense(8)(inputs))
    x = keras.layers.Dense(6)(keras.layers.ReLU()(x))
    model = wrap(keras.Model(inputs, x))
    optimizer = keras.optimizers.SGD(0.1)

    @wrap.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x):
        gradients, loss = forward_backward(x)
        gradients = [wrap.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return wrap.allreduce(loss.reduce_mean())

    x = tf.constant(wrap.shard(points()))
    losses = [float(train(x)) for _ in range(3)]
    trained = [w for w in model.get_weights() if w.shape != (8,)]
    return {"losses": losses, "weights": [[w.sum(), (w * w).sum()] for w in trained]}
