"""Models that are made by Keras: Functional, Sequential, subclassed, nested, pretrained-like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED, SEVERAL_USES
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
    vectors,
)
from parity.layout import Layout, Maker

Tensor = Any
ONE_OF_EACH = (Layout(2, 2, "interleaved", "auto"), Layout(3, 1, "simple", "auto"))


def functional(make: Maker) -> Any:
    """Contexts around layer calls while a Functional model is being built."""
    inputs = keras.Input((8,))
    with make.partition(0):
        x = keras.layers.Dense(8, activation="relu")(inputs)
        skip = x
    with make.partition(1):
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Dropout(0.2)(x)
        x = keras.layers.Dense(8)(x)
    with make.partition(2):
        x = keras.layers.Add()([x, skip])
        x = keras.ops.tanh(x) * 2.0
    with make.partition(3):
        outputs = keras.layers.Dense(3)(x)
    return make.functional(inputs, outputs)


def functional_shared(make: Maker) -> Any:
    """One layer called twice, in different partitions; two inputs, two outputs."""
    left, right = keras.Input((8,), name="left"), keras.Input((8,), name="right")
    shared = keras.layers.Dense(8, activation="tanh")
    with make.partition(0):
        x = shared(left)
    with make.partition(1):
        y = keras.layers.Dense(8)(shared(right))
    with make.partition(2):
        joined = keras.layers.Concatenate()([x, y])
        first = keras.layers.Dense(3)(joined)
    with make.partition(3):
        second = keras.layers.Dense(2, activation="relu")(joined)
    return make.functional({"left": left, "right": right}, [first, second])


def functional_nested(make: Maker) -> Any:
    """A Sequential and a Functional model as layers of another one."""
    inner_inputs = keras.Input((8,))
    inner = keras.Model(inner_inputs, keras.layers.Dense(8)(inner_inputs) + inner_inputs)
    sequential = keras.Sequential(
        [keras.layers.Dense(8, activation="relu"), keras.layers.LayerNormalization()]
    )
    inputs = keras.Input((8,))
    with make.partition(0):
        x = sequential(inputs)
    with make.partition(1):
        x = inner(x)
    with make.partition(2):
        x = inner(x)
    with make.partition(3):
        x = keras.layers.Dense(3)(x)
    return make.functional(inputs, x)


def plain_functional() -> Any:
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()([x, inputs])))


def plain_sequential(*, built: bool) -> Any:
    layers = [
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(8, activation="tanh"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(3),
    ]
    return keras.Sequential([keras.Input((8,)), *layers] if built else layers)


def taken(model: Callable[[], Any]) -> Callable[[Maker], Any]:
    """A finished plain Keras model, taken as it is."""
    return lambda make: make.take(model())


def taken_subclass(make: Maker) -> Any:
    """A plain subclass of `keras.Model` that was built and called before it is taken."""

    class Subclass(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8, activation="relu")
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.first(x)
            with make.partition(1):
                return self.last(x)

    model = Subclass()
    model(tf.zeros([1, 8]))
    return make.take(model)


def taken_nested(make: Maker) -> Any:
    """A plain Functional model with a Sequential and a Functional one inside."""
    inputs = keras.Input((8,))
    x = plain_sequential(built=False)(inputs)
    x = keras.layers.Dense(8)(x)
    return make.take(keras.Model(inputs, plain_functional()(x)))


def with_backbone(backbone: Callable[..., Any]) -> Callable[[Maker], Any]:
    """A backbone as people load it, inside a model with a head of its own."""

    def model(make: Maker) -> Any:
        class Classifier(make.Model):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = backbone(weights=None, include_top=False, input_shape=(32, 32, 3))
                self.pool = keras.layers.GlobalAveragePooling2D()
                self.top = keras.layers.Dense(5)

            def call(self, x: Tensor, training: bool | None = None) -> Tensor:
                with make.partition(0):
                    x = self.backbone(x, training=training)
                with make.partition(1):
                    return self.top(self.pool(x))

        return Classifier()

    return model


def _case(name: str, parts: Any, **options: Any) -> Case:
    return Case(name, parts, vectors(8, 3), supervised(), **options)


def _pair(random: Any, size: int) -> tuple[Any, ...]:
    left, right = vectors(8, 8)(random, size)
    return {"left": left, "right": right}, vectors(3, 2)(random, size)


def _pair_loss(y: Any, outputs: Any) -> Tensor:
    return sum(tf.reduce_mean(tf.square(a - b)) for a, b in zip(y, outputs, strict=True))


CASES = (
    _case(
        "Functional",
        functional,
        num_stages=4,
        bound=SEVERAL_USES,
        optimizer=momentum,
        per_microbatch=8,
        evaluate=evaluation(),
    ),
    _case(
        "Functional, pattern 0-1-0-1",
        functional,
        num_stages=4,
        layouts=CYCLIC,
        bound=SEVERAL_USES,
        optimizer=momentum,
        per_microbatch=8,
    ),
    _case("Functional, automatic partitions", functional, num_stages=4, layouts=AUTO),
    Case(
        "Functional, layer shared by partitions",
        functional_shared,
        _pair,
        supervised(_pair_loss),
        bound=REASSOCIATED,
        num_stages=4,
    ),
    _case("Functional with models inside", functional_nested, num_stages=4, bound=REASSOCIATED),
    _case("from_keras, Functional", taken(plain_functional), layouts=AUTO),
    _case(
        "from_keras, Sequential, built",
        taken(lambda: plain_sequential(built=True)),
        layouts=AUTO,
        evaluate=evaluation(),
    ),
    _case(
        "from_keras, Sequential, not built",
        taken(lambda: plain_sequential(built=False)),
        layouts=AUTO,
        evaluate=evaluation(),
    ),
    _case("from_keras, subclass", taken_subclass, layouts=TWO),
    _case("from_keras, models inside", taken_nested, layouts=AUTO),
    Case(
        "MobileNetV2 inside a subclass",
        with_backbone(keras.applications.MobileNetV2),
        images(32, 3, 5),
        supervised(cross_entropy),
        layouts=(Layout(2, 2, "interleaved"), ONE_OF_EACH[0]),
        per_microbatch=2,
        heavy=True,
    ),
    Case(
        "ResNet50 inside a subclass",
        with_backbone(keras.applications.ResNet50),
        images(32, 3, 5),
        supervised(cross_entropy),
        layouts=ONE_OF_EACH[:1],
        per_microbatch=2,
        heavy=True,
    ),
)
