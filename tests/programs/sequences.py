"""Programs of sequences: translation, language models, tagging, speech."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from programs.material import points, sums, words
from programs.registry import program, refused

WORDS = 11


@program("fit")
def seq2seq(wrap):
    """Translation with teacher forcing; encoder and decoder become models of their own."""
    source, target = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(WORDS, 6, name="source")(source)
    _, *state = keras.layers.LSTM(5, return_state=True, name="encoder")(embedded)
    decoder_embedding = keras.layers.Embedding(WORDS, 6, name="target")
    decoder = keras.layers.LSTM(5, return_sequences=True, return_state=True, name="decoder")
    sequence, _, _ = decoder(decoder_embedding(target), initial_state=state)
    head = keras.layers.Dense(WORDS, activation="softmax", name="head")
    model = wrap(keras.Model([source, target], head(sequence)))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    x, y = words(24), words(24, 6, seed=3)
    data = [x, y[:, :-1]]
    history = model.fit(data, y[:, 1:], batch_size=12, epochs=2, shuffle=False, verbose=0).history

    encoder = wrap(keras.Model(source, state))
    states = [keras.Input((5,)), keras.Input((5,))]
    sequence, *after = decoder(decoder_embedding(target), initial_state=states)
    one_step = wrap(keras.Model([target, *states], [head(sequence), *after]))
    token, state = np.ones((4, 1), "int32"), encoder.predict(x[:4], verbose=0)
    found = []
    for _ in range(3):
        probabilities, *state = one_step.predict([token, *state], verbose=0)
        token = probabilities[:, -1].argmax(axis=-1)[:, None].astype("int32")
        found.append(probabilities)
    return {"history": history, "found": found, "weights": sums(model)}


class Decoder(keras.Model):
    """A small language model."""

    def __init__(self):
        super().__init__()
        self.tokens = keras.layers.Embedding(WORDS, 8)
        self.places = keras.layers.Embedding(8, 8)
        self.attention = [keras.layers.MultiHeadAttention(2, 4) for _ in range(2)]
        self.feed = [keras.layers.Dense(8, activation="gelu") for _ in range(2)]
        self.norms = [keras.layers.LayerNormalization() for _ in range(4)]
        self.head = keras.layers.Dense(WORDS)

    def call(self, ids):
        x = self.tokens(ids) + self.places(ops.arange(ops.shape(ids)[1]))
        for i in range(2):
            y = self.norms[2 * i](x)
            x += self.attention[i](y, y, use_causal_mask=True)
            x += self.feed[i](self.norms[2 * i + 1](x))
        return self.head(x)


@program("fit")
def language_model(wrap):
    """Language model that writes, word by word with predict, between its epochs."""
    model = wrap(Decoder())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(0.01), loss, metrics=["accuracy"])
    text = words(24, 7)
    histories, written = [], []
    for _ in range(2):
        histories.append(
            model.fit(text[:, :-1], text[:, 1:], batch_size=12, shuffle=False, verbose=0).history
        )
        ids = text[:2, :3]
        for _ in range(2):
            logits = model.predict(ids, verbose=0)
            ids = np.concatenate([ids, logits[:, -1:].argmax(axis=-1)], axis=1).astype("int32")
        written.append(ids)
    return {"histories": histories, "written": written, "weights": sums(model)}


@program("fit")
def writing_callback(wrap):
    """A callback that calls the model at the end of each epoch and looks at its words."""

    class Write(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.written = []

        def on_epoch_end(self, epoch, logs=None):
            ids = words(2, 3, seed=9)
            for _ in range(2):
                logits = np.asarray(self.model(ids, training=False))
                ids = np.concatenate([ids, logits[:, -1:].argmax(axis=-1)], axis=1).astype("int32")
            self.written.append(ids)

    model, write = wrap(Decoder()), Write()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    text = words(24, 7)
    history = model.fit(
        text[:, :-1], text[:, 1:], batch_size=12, epochs=2, shuffle=False, verbose=0,
        callbacks=[write],
    ).history  # fmt: skip
    return {"history": history, "written": write.written}


@program("fit")
def tagging_with_masks(wrap):
    """Tagging of padded sequences: masks, and a weight for each word."""
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 6, mask_zero=True)(inputs)
    x = keras.layers.Bidirectional(keras.layers.GRU(4, return_sequences=True))(x)
    model = wrap(keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x)))
    model.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
    )  # fmt: skip
    ids = words(24) * (np.arange(5) < (np.arange(24) % 4 + 2)[:, None])
    tags = words(24, 5, 3, seed=5) % 3
    history = model.fit(
        ids, tags, sample_weight=(ids > 0) * (1.0 + tags), batch_size=12, epochs=2,
        shuffle=False, verbose=0,
    ).history  # fmt: skip
    return {"history": history, "predictions": model.predict(ids, verbose=0)}


class Crf(keras.Model):
    """Scores of tags for each word, and of pairs of tags."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(WORDS, 6)
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.scores = keras.layers.Dense(3)

    def build(self, shape):
        self.embedding.build(shape)
        self.transitions = self.add_weight(shape=(3, 3), initializer="random_normal", name="pairs")

    def call(self, ids):
        return self.scores(self.hidden(self.embedding(ids)))

    def unlikelihood(self, scores, tags):
        pairs = ops.convert_to_tensor(self.transitions)
        alpha = scores[:, 0]
        for i in range(1, scores.shape[1]):
            alpha = scores[:, i] + ops.logsumexp(alpha[:, :, None] + pairs[None], axis=1)
        chosen = ops.one_hot(tags, 3, dtype=scores.dtype)
        path = ops.sum(scores * chosen, axis=(1, 2))
        path += ops.einsum("bti,ij,btj->b", chosen[:, :-1], pairs, chosen[:, 1:])
        return ops.mean(ops.logsumexp(alpha, axis=1) - path)

    def train_step(self, data):
        ids, tags = data
        with tf.GradientTape() as tape:
            loss = self.unlikelihood(self(ids, training=True), tags)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}

    def test_step(self, data):
        ids, tags = data
        return {"loss": self.unlikelihood(self(ids, training=False), tags)}


@program("train_step")
def crf(wrap):
    """Conditional random field: pairs of tags are weights that only the loss reads."""
    model = wrap(Crf())
    model.compile(keras.optimizers.Adam(0.02))
    ids, tags = words(24), words(24, 5, 3, seed=5) % 3
    history = model.fit(ids, tags, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    scores = model.evaluate(ids, tags, batch_size=12, verbose=0, return_dict=True)
    return {"history": history, "scores": scores, "weights": sums(model)}


@program("fit", policy="float32", bound=2e-3, why="CTC is computed in float32")
def ctc(wrap):
    """Speech: CTC as a compiled loss."""
    inputs = keras.Input((8, 6))
    x = keras.layers.Conv1D(8, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.GRU(6, return_sequences=True)(x)
    model = wrap(keras.Model(inputs, keras.layers.Dense(5)(x)))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.CTC())
    sounds = points(24, 48).reshape(24, 8, 6)
    truth = words(24, 3, 5, seed=4)
    history = model.fit(sounds, truth, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "predictions": model.predict(sounds, verbose=0)}


@program("fit", policy="float32", bound=2e-3, why="CTC is computed in float32")
def ctc_as_a_layer(wrap):
    """Reading: a layer adds the CTC loss, and a sub-model makes the predictions."""

    class CtcLayer(keras.layers.Layer):
        def call(self, truth, scores):
            rows = ops.shape(truth)[0]
            lengths = ops.full((rows,), scores.shape[1], dtype="int32")
            self.add_loss(ops.ctc_loss(truth, scores, ops.full((rows,), 3, dtype="int32"), lengths))
            return scores

    picture, truth = keras.Input((8, 6), name="picture"), keras.Input((3,), dtype="int32")
    x = keras.layers.Dense(8, activation="relu")(picture)
    x = keras.layers.LSTM(6, return_sequences=True)(x)
    scores = keras.layers.Dense(5, name="scores")(x)
    model = wrap(keras.Model([picture, truth], CtcLayer()(truth, scores)))
    model.compile(keras.optimizers.Adam(0.01))
    data = [points(24, 48).reshape(24, 8, 6), words(24, 3, 5, seed=4)]
    history = model.fit(data, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    reader = wrap(keras.Model(model.inputs[0], model.get_layer("scores").output))
    return {"history": history, "read": reader.predict(data[0][:4], verbose=0)}


@program(
    "fit",
    microbatches=1,
    why="the state of a row goes on in the next batch",
    refused=refused(
        ("2 x 2",),
        "StepError",
        "a batch is divided among 2 replicas",
        "the model is for the rows of a whole batch, and a replica has a part of them",
    ),
)
def stateful_rnn(wrap):
    """A stateful LSTM that goes through long sequences in pieces, with resets."""
    inputs = keras.Input(batch_shape=(12, 4, 3))
    lstm = keras.layers.LSTM(5, stateful=True)
    model = wrap(keras.Model(inputs, keras.layers.Dense(2)(lstm(inputs))))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = []
    for _ in range(2):
        for piece in range(3):
            x = points(12, 12, seed=piece).reshape(12, 4, 3)
            losses.append(model.train_on_batch(x, points(12, 2, seed=piece)))
        lstm.reset_state()
    return {"losses": losses, "weights": sums(model)}


@program("train_step")
def truncated_backpropagation(wrap):
    """Long sequences in pieces: the state is an output and an input of the model."""

    class Pieces(keras.Model):
        def __init__(self):
            super().__init__()
            self.cell = keras.layers.GRU(5, return_sequences=True, return_state=True)
            self.out = keras.layers.Dense(3)

        def call(self, inputs):
            x, state = inputs
            sequence, state = self.cell(x, initial_state=state)
            return self.out(sequence), state

        def train_step(self, data):
            x, y = data
            state, losses = ops.zeros((ops.shape(x)[0], 5)), []
            for i in range(0, 9, 3):
                with tf.GradientTape() as tape:
                    found, state = self((x[:, i : i + 3], state), training=True)
                    loss = ops.mean((found - y[:, i : i + 3]) ** 2)
                gradients = tape.gradient(loss, self.trainable_variables)
                self.optimizer.apply_gradients(
                    zip(gradients, self.trainable_variables, strict=True)
                )
                state = ops.stop_gradient(state)
                losses.append(loss)
            return {"loss": sum(losses) / 3.0, "state": ops.mean(ops.abs(state))}

    model = wrap(Pieces())
    model.compile(keras.optimizers.SGD(0.2))
    x, y = points(12, 36).reshape(12, 9, 4), points(12, 27, seed=1).reshape(12, 9, 3)
    history = model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": sums(model)}


@program("train_step")
def direct_preferences(wrap):
    """Preferences between two answers, against a frozen copy of the language model."""

    class Preferences(keras.Model):
        def __init__(self, policy, reference):
            super().__init__()
            self.policy, self.reference = policy, reference
            self.reference.trainable = False

        def likelihood(self, model, ids):
            logs = ops.log_softmax(model(ids[:, :-1]))
            chosen = ops.one_hot(ids[:, 1:], WORDS, dtype=logs.dtype)
            return ops.sum(logs * chosen, axis=(1, 2))

        def train_step(self, data):
            good, bad = data
            before = [ops.stop_gradient(self.likelihood(self.reference, i)) for i in (good, bad)]
            with tf.GradientTape() as tape:
                now = [self.likelihood(self.policy, ids) for ids in (good, bad)]
                margin = (now[0] - before[0]) - (now[1] - before[1])
                loss = ops.mean(ops.softplus(-0.1 * margin))
            weights = self.policy.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss, "margin": ops.mean(margin)}

    policy, reference = Decoder(), Decoder()
    for model in (policy, reference):
        model(words(1, 6))
    reference.set_weights(policy.get_weights())
    model = wrap(Preferences(policy, reference))
    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(
        words(24, 7), words(24, 7, seed=8), batch_size=12, epochs=2, shuffle=False, verbose=0
    ).history
    return {"history": history, "weights": sums(model)}
