"""Programs whose losses compare the rows of a batch with each other."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops
from programs.material import labels, mlp, only_x, points, sums, words
from programs.registry import program


def unit(x):
    return x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-12)


def nt_xent(one, other, temperature=0.5):
    """Each row of one view has to find its row in the other one."""
    similar = ops.matmul(unit(one), ops.transpose(unit(other))) / temperature
    truth = ops.arange(ops.shape(one)[0])
    there = keras.losses.sparse_categorical_crossentropy(truth, similar, from_logits=True)
    back = keras.losses.sparse_categorical_crossentropy(
        truth, ops.transpose(similar), from_logits=True
    )
    return ops.mean(there + back) / 2


class Contrastive(keras.Model):
    """Encoder, projection head and linear probe, each a model called by the train_step."""

    def __init__(self, encoder, head, probe, compare):
        super().__init__()
        self.encoder, self.head, self.probe, self.compare = encoder, head, probe, compare
        self.seeds = keras.random.SeedGenerator(1)

    def compile(self, optimizer, probe_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer, self.probe_optimizer = optimizer, probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    @property
    def metrics(self):
        return [self.accuracy]

    def view(self, x):
        return x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seeds)

    def train_step(self, data):
        x, y = data
        one, other = self.view(x), self.view(x)
        with tf.GradientTape() as tape:
            found = [self.head(self.encoder(view, training=True)) for view in (one, other)]
            loss = self.compare(*found)
        weights = self.encoder.trainable_weights + self.head.trainable_weights
        self.contrastive_optimizer.apply_gradients(
            zip(tape.gradient(loss, weights), weights, strict=True)
        )
        with tf.GradientTape() as tape:
            logits = self.probe(self.encoder(x, training=False))
            probed = self.probe_loss(y, logits)
        weights = self.probe.trainable_weights
        self.probe_optimizer.apply_gradients(
            zip(tape.gradient(probed, weights), weights, strict=True)
        )
        self.accuracy.update_state(y, logits)
        return {"contrastive": loss, "probe": probed, "accuracy": self.accuracy.result()}

    def test_step(self, data):
        x, y = data
        logits = self.probe(self.encoder(x, training=False))
        self.accuracy.update_state(y, logits)
        return {"probe": self.probe_loss(y, logits), "accuracy": self.accuracy.result()}


def contrast(wrap, compare):
    model = wrap(Contrastive(mlp(6, 8, 8), mlp(8, 8, 5), mlp(8, 4), compare))
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1))
    history = model.fit(
        points(24), labels(24), batch_size=12, epochs=2, shuffle=False, verbose=0,
        validation_data=(points(12, seed=8), labels(12, seed=9)),
    ).history  # fmt: skip
    return {"history": history, "weights": sums(model)}


@program("train_step")
def simclr(wrap):
    """SimCLR: encoder, head and probe called by the class; each row against all others."""
    return contrast(wrap, nt_xent)


@program("train_step")
def barlow_twins(wrap):
    """Barlow Twins: the correlation of two views over the batch."""

    def redundancy(one, other):
        one, other = (
            (view - ops.mean(view, axis=0)) / (ops.std(view, axis=0) + 1e-6)
            for view in (one, other)
        )
        rows = ops.cast(ops.shape(one)[0], one.dtype)
        correlation = ops.matmul(ops.transpose(one), other) / rows
        diagonal = ops.diagonal(correlation)
        off = ops.sum(correlation**2) - ops.sum(diagonal**2)
        return ops.sum((diagonal - 1) ** 2) + 0.05 * off

    return contrast(wrap, redundancy)


@program("train_step")
def vicreg(wrap):
    """VICReg: variance and covariance of a batch as losses."""

    def regularize(one, other):
        loss = ops.mean((one - other) ** 2)
        for view in (one, other):
            centred = view - ops.mean(view, axis=0)
            covariance = ops.matmul(ops.transpose(centred), centred) / 11.0
            spread = ops.sqrt(ops.diagonal(covariance) + 1e-4)
            loss += ops.mean(ops.relu(1 - spread))
            loss += 0.1 * (ops.sum(covariance**2) - ops.sum(ops.diagonal(covariance) ** 2))
        return loss

    return contrast(wrap, regularize)


@program("train_step")
def clip(wrap):
    """Pictures and texts: two towers, and a temperature that is trained."""

    class Clip(keras.Model):
        def __init__(self):
            super().__init__()
            self.vision = mlp(6, 8, 5)
            self.text = keras.Sequential(
                [
                    keras.layers.Embedding(11, 6),
                    keras.layers.GlobalAveragePooling1D(),
                    keras.layers.Dense(5),
                ]
            )

        def build(self, shape):
            self.text.build(shape["text"])
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, inputs):
            return unit(self.vision(inputs["image"])), unit(self.text(inputs["text"]))

        def train_step(self, data):
            inputs = only_x(data)
            with tf.GradientTape() as tape:
                image, text = self(inputs, training=True)
                logits = ops.exp(self.scale) * ops.matmul(image, ops.transpose(text))
                truth = ops.arange(ops.shape(logits)[0])
                loss = keras.losses.sparse_categorical_crossentropy(truth, logits, from_logits=True)
                loss += keras.losses.sparse_categorical_crossentropy(
                    truth, ops.transpose(logits), from_logits=True
                )
                loss = ops.mean(loss) / 2
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss, "scale": self.scale.value}

    model = wrap(Clip())
    model.compile(keras.optimizers.Adam(0.02))
    data = {"image": points(24), "text": words(24)}
    history = model.fit(data, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    image, text = model.predict(data, batch_size=12, verbose=0)
    return {"history": history, "scores": image @ text.T, "weights": sums(model)}


@program("fit")
def in_batch_negatives(wrap):
    """Retrieval with a compiled loss over all rows of the batch."""

    def retrieval(y_true, y_pred):
        query, item = y_pred[:, :4], y_pred[:, 4:]
        scores = ops.matmul(query, ops.transpose(item))
        truth = ops.arange(ops.shape(scores)[0])
        return ops.mean(
            keras.losses.sparse_categorical_crossentropy(truth, scores, from_logits=True)
        )

    query, item = keras.Input((6,)), keras.Input((5,))
    towers = keras.layers.Concatenate()([mlp(6, 8, 4)(query), mlp(5, 8, 4)(item)])
    model = wrap(keras.Model([query, item], towers))
    model.compile(keras.optimizers.Adagrad(0.1), retrieval)
    data = [points(28), points(28, 5, seed=3)]
    history = model.fit(
        data, points(28, 1), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def triplets(wrap):
    """One tower called three times, with a loss of the distances."""

    class Siamese(keras.Model):
        def __init__(self, tower):
            super().__init__()
            self.tower = tower

        def call(self, inputs):
            anchor, near, far = (self.tower(x) for x in inputs)
            return ops.sum((anchor - near) ** 2, -1), ops.sum((anchor - far) ** 2, -1)

        def train_step(self, data):
            with tf.GradientTape() as tape:
                near, far = self(only_x(data), training=True)
                loss = ops.mean(ops.maximum(near - far + 0.5, 0.0))
            gradients = tape.gradient(loss, self.tower.trainable_weights)
            self.optimizer.apply_gradients(
                zip(gradients, self.tower.trainable_weights, strict=True)
            )
            return {"loss": loss}

    model = wrap(Siamese(mlp(6, 8, 8, 4)))
    model.compile(keras.optimizers.SGD(0.1))
    data = tf.data.Dataset.from_tensor_slices(
        ((points(24), points(24, seed=1), points(24, seed=2)),)
    ).batch(12)
    history = model.fit(data, epochs=2, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("fit")
def semi_hard_triplets(wrap):
    """Embeddings of which a compiled loss looks for the hardest pairs of the batch."""

    def hardest(y_true, y_pred):
        squares = ops.sum(y_pred**2, axis=1)
        distances = squares[:, None] + squares[None] - 2 * ops.matmul(y_pred, ops.transpose(y_pred))
        same = ops.cast(ops.equal(y_true, ops.transpose(y_true)), distances.dtype)
        near = ops.max(same * distances, axis=1)
        far = ops.min(distances + 1e3 * same, axis=1)
        return ops.maximum(near - far + 1.0, 0.0)

    model = wrap(mlp(6, 8, 8, 3))
    model.compile(keras.optimizers.SGD(0.05), hardest)
    truth = labels(24)[:, None].astype(keras.config.floatx())
    history = model.fit(
        points(24), truth, batch_size=12, epochs=3, shuffle=False, verbose=0
    ).history
    return {"history": history, "predictions": model.predict(points(), verbose=0)}


@program("train_step")
def byol(wrap):
    """BYOL: a network that follows another one as a moving average."""

    class Byol(keras.Model):
        def __init__(self):
            super().__init__()
            self.online, self.predictor = mlp(6, 8, 4), mlp(4, 8, 4)
            self.target = keras.models.clone_model(self.online)
            self.target.set_weights(self.online.get_weights())
            self.seeds = keras.random.SeedGenerator(1)

        def train_step(self, data):
            x = only_x(data)
            views = [x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seeds) for _ in "ab"]
            goals = [ops.stop_gradient(unit(self.target(view))) for view in views]
            with tf.GradientTape() as tape:
                found = [unit(self.predictor(self.online(view))) for view in views]
                loss = 2 - ops.mean(ops.sum(found[0] * goals[1] + found[1] * goals[0], axis=-1))
            weights = self.online.trainable_variables + self.predictor.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            for slow, fast in zip(self.target.weights, self.online.weights, strict=True):
                slow.assign(0.95 * slow + 0.05 * fast)
            return {"loss": loss}

    model = wrap(Byol())
    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(points(24), batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def queue_of_negatives(wrap):
    """MoCo: a queue of earlier rows in a variable, as negatives."""

    class Moco(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.out = keras.layers.Dense(4)
            start = keras.initializers.RandomNormal(seed=3)
            self.queue = self.add_weight(shape=(24, 4), initializer=start, trainable=False)

        def call(self, x):
            return unit(self.out(self.hidden(x)))

        def train_step(self, data):
            x, near = data
            keys = ops.stop_gradient(self(near))
            with tf.GradientTape() as tape:
                found = self(x, training=True)
                right = ops.sum(found * keys, axis=-1, keepdims=True)
                wrong = ops.matmul(found, ops.transpose(self.queue.value))
                logits = ops.concatenate([right, wrong], axis=1) / 0.2
                truth = ops.zeros((ops.shape(x)[0],), dtype="int32")
                loss = ops.mean(
                    keras.losses.sparse_categorical_crossentropy(truth, logits, from_logits=True)
                )
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            self.queue.assign(ops.concatenate([keys, self.queue], axis=0)[:24])
            return {"loss": loss, "queue": ops.mean(self.queue)}

    model = wrap(Moco())
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    history = model.fit(
        points(24), points(24, seed=4), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}


@program("fit")
def center_loss(wrap):
    """A layer that adds a loss for each example, of centres that are weights."""

    class Centres(keras.layers.Layer):
        def build(self, shapes):
            self.centres = self.add_weight(shape=(4, shapes[0][-1]), initializer="random_normal")

        def call(self, inputs):
            features, truth = inputs
            own = ops.take(self.centres, truth[:, 0], axis=0)
            self.add_loss(0.1 * ops.sum((features - own) ** 2, axis=-1))
            return features

    x, y = keras.Input((6,)), keras.Input((1,), dtype="int32")
    features = Centres()([keras.layers.Dense(8, activation="tanh")(x), y])
    model = wrap(keras.Model([x, y], keras.layers.Dense(4, activation="softmax")(features)))
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    data = [points(24), labels(24)[:, None]]
    history = model.fit(data, data[1], batch_size=12, epochs=3, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}
