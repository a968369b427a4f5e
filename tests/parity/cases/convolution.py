"""Convolutional models: batch statistics, dropout, skips across partitions."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED
from parity.case import (
    AUTO,
    CYCLIC,
    TWO,
    Case,
    cross_entropy,
    evaluation,
    images,
    momentum,
    supervised,
)
from parity.layout import Maker, with_policy

Tensor = Any


def cnn(make: Maker) -> Any:
    class CNN(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = [keras.layers.Conv2D(8, 3, padding="same") for _ in range(3)]
            self.norms = [keras.layers.BatchNormalization() for _ in range(3)]
            self.dropouts = [keras.layers.Dropout(0.3) for _ in range(3)]
            self.pool = keras.layers.MaxPooling2D()
            self.flatten = keras.layers.Flatten()
            self.top = keras.layers.Dense(5)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            for stage in range(3):
                with make.partition(stage):
                    x = self.convolutions[stage](x)
                    x = tf.nn.relu(self.norms[stage](x, training=training))
                    x = self.dropouts[stage](self.pool(x) if stage else x, training=training)
            with make.partition(3):
                return self.top(self.flatten(x))

    return CNN()


def resnet(make: Maker) -> Any:
    """Every border between stages lies within a residual block: its skip crosses it."""

    class ResNet(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stem = keras.layers.Conv2D(8, 3, padding="same")
            self.blocks = [
                [keras.layers.Conv2D(8, 3, padding="same", use_bias=False) for _ in range(2)]
                + [keras.layers.BatchNormalization() for _ in range(2)]
                for _ in range(3)
            ]
            self.pool = keras.layers.GlobalAveragePooling2D()
            self.top = keras.layers.Dense(5)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.stem(x)
            for stage, (first, second, *norms) in enumerate(self.blocks):
                with make.partition(stage):
                    y = tf.nn.relu(norms[0](first(x), training=training))
                with make.partition(stage + 1):
                    x = tf.nn.relu(x + norms[1](second(y), training=training))
            with make.partition(3):
                return self.top(self.pool(x))

    return ResNet()


def cut_sum(make: Maker) -> Any:
    """A sum of three terms, of which two are added in one stage and the third in the next."""

    class CutSum(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stem = keras.layers.Conv2D(5, 3, padding="same")
            self.inner = keras.layers.Conv2D(5, 3, padding="same", use_bias=False)
            self.norm = keras.layers.BatchNormalization()

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.stem(x)
                y = self.norm(self.inner(x), training=training)  # ends in a sum: x * a + b
            with make.partition(1):
                return tf.reduce_mean(tf.nn.relu(x + y), axis=[1, 2])

    return CutSum()


def unet(make: Maker) -> Any:
    """Goes down through the partitions and up again, with a concatenation at each."""

    class UNet(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.down = [keras.layers.Conv2D(4, 3, padding="same") for _ in range(3)]
            self.up = [keras.layers.Conv2DTranspose(4, 2, strides=2) for _ in range(2)]
            self.mix = [keras.layers.SeparableConv2D(4, 3, padding="same") for _ in range(2)]
            self.norm = keras.layers.GroupNormalization(2)
            self.top = keras.layers.Conv2D(5, 1)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            levels = []
            for stage, layer in enumerate(self.down):
                with make.partition(stage):
                    x = tf.nn.relu(layer(x))
                    levels.append(x)
                    x = tf.nn.max_pool2d(x, 2, 2, "SAME") if stage < 2 else self.norm(x)
            for stage in (1, 0):
                with make.partition(stage):
                    x = tf.concat([self.up[stage](x), levels[stage]], -1)
                    x = self.mix[stage](x)
            with make.partition(0):
                return tf.reduce_mean(self.top(x), axis=[1, 2])

    return UNet()


def _images(name: str, parts: Any, **options: Any) -> Case:
    return Case(name, parts, images(8, 3, 5), supervised(cross_entropy), **options)


CASES = (
    _images("CNN, BatchNorm, Dropout", cnn, num_stages=4, evaluate=evaluation(cross_entropy)),
    _images("CNN, pattern 0-1-0-1", cnn, num_stages=4, layouts=CYCLIC),
    _images("CNN, automatic partitions", cnn, num_stages=4, layouts=AUTO),
    _images("ResNet, skips across partitions", resnet, num_stages=4),
    _images("sum cut by a border", cut_sum, layouts=TWO, bound=REASSOCIATED, optimizer=momentum),
    _images("U-Net, pattern 0-1-2-1-0", unet, num_stages=3),
    Case(
        "CNN in inference mode",
        cnn,
        images(8, 3, 5),
        supervised(cross_entropy, training=False),
        num_stages=4,
    ),
    Case(
        "CNN, float64",
        lambda make: with_policy("float64", cnn, make),
        images(8, 3, 5, "float64"),
        supervised(cross_entropy),
        num_stages=4,
    ),
    *(
        Case(
            f"CNN, {policy}",
            lambda make, policy=policy: with_policy(policy, cnn, make),
            images(8, 3, 5),
            supervised(lambda y, z: cross_entropy(y, tf.cast(z, tf.float32))),
            num_stages=4,
        )
        for policy in ("mixed_float16", "mixed_bfloat16")
    ),
)
