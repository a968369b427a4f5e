"""Transformers: attention with masks and dropout, tied embeddings."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import SEVERAL_USES_DOUBLE
from parity.case import (
    AUTO,
    CYCLIC,
    TWO,
    Case,
    cross_entropy,
    evaluation,
    supervised,
    tokens,
)
from parity.layout import Maker, with_policy

Tensor = Any
VOCABULARY, LENGTH, WIDTH = 23, 6, 16


class Block(keras.layers.Layer):
    """Attention and a feed-forward network, each with a skip, normalised before."""

    def __init__(self, use_bias: bool = True) -> None:
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(
            2, WIDTH // 2, dropout=0.1, use_bias=use_bias
        )
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.inner = keras.layers.Dense(2 * WIDTH, activation="gelu")
        self.outer = keras.layers.Dense(WIDTH)
        self.dropout = keras.layers.Dropout(0.1)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, use_causal_mask=True, training=training)
        y = self.outer(self.inner(self.norms[1](x)))
        return x + self.dropout(y, training=training)


def transformer(make: Maker, *, tied: bool = True, num_blocks: int = 2) -> Any:
    class Transformer(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
            self.positions = keras.layers.Embedding(LENGTH, WIDTH)
            self.blocks = [Block() for _ in range(num_blocks)]
            self.norm = keras.layers.LayerNormalization()
            self.top = None if tied else keras.layers.Dense(VOCABULARY)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.embedding(ids) + self.positions(tf.range(LENGTH))
            for stage, block in enumerate(self.blocks):
                with make.partition(stage):
                    x = block(x, training=training)
            with make.partition(num_blocks):
                x = self.norm(x)
                if self.top is not None:
                    return self.top(x)
                table = tf.convert_to_tensor(self.embedding.embeddings)
                return tf.matmul(x, tf.cast(table, x.dtype), transpose_b=True)

    return Transformer()


def cross_attention(make: Maker) -> Any:
    """An encoder and a decoder: every stage of the decoder reads the encoder's output."""

    class EncoderDecoder(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
            # No biases: the gradient of a key's bias is zero, all of it would be rounding.
            self.encoder = Block(use_bias=False)
            self.decoders = [
                keras.layers.MultiHeadAttention(2, WIDTH // 2, use_bias=False) for _ in range(2)
            ]
            self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
            self.top = keras.layers.Dense(VOCABULARY)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.embedding(ids)
                memory = self.encoder(x, training=training)
            for stage, attention in enumerate(self.decoders, start=1):
                with make.partition(stage):
                    x = self.norms[stage - 1](x + attention(x, memory))
            with make.partition(2):
                return self.top(x)

    return EncoderDecoder()


def _language(name: str, parts: Any, loss_of: Any = cross_entropy, **options: Any) -> Case:
    batch = tokens(LENGTH, VOCABULARY)
    return Case(
        name, parts, batch, supervised(loss_of), num_stages=3, **{"layouts": TWO, **options}
    )


CASES = (
    _language("Transformer, tied embedding", transformer, evaluate=evaluation(cross_entropy)),
    _language("Transformer, own output layer", lambda make: transformer(make, tied=False)),
    _language("Transformer, pattern 0-1-0", transformer, layouts=CYCLIC[:1]),
    _language("Transformer, automatic partitions", transformer, layouts=AUTO[1:]),
    _language(
        "encoder and decoder",
        lambda make: with_policy("float64", cross_attention, make),
        bound=SEVERAL_USES_DOUBLE,
    ),
    _language(
        "Transformer, mixed_bfloat16",
        lambda make: with_policy("mixed_bfloat16", transformer, make),
        lambda y, z: cross_entropy(y, tf.cast(z, tf.float32)),
        layouts=TWO[1:],
    ),
    _language(
        "Transformer, float64",
        lambda make: with_policy("float64", transformer, make),
        layouts=TWO[1:],
    ),
)
