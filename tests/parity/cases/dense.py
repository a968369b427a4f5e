"""Dense models: the ways in which stages, variables, inputs and outputs are connected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from parity.bounds import JOINED, JOINED_DOUBLE, SEVERAL_USES
from parity.case import (
    CYCLIC,
    TWO,
    Case,
    Parts,
    StepFunction,
    evaluation,
    mean_squared_error,
    momentum,
    supervised,
    vectors,
)
from parity.layout import Layout, Maker, with_policy

Tensor = Any

JOINING = (
    Layout(2, 4, "interleaved", "blocks", "speed"),
    Layout(2, 8, "zero_bubble", "cyclic", "speed"),
    Layout(4, 6, "simple", "blocks", "speed"),
)


def layers(units: int, activation: str, outputs: int) -> Callable[[Maker], Any]:
    """Three hidden layers, each in a stage, and one more."""

    def model(make: Maker) -> Any:
        class MLP(make.Model):
            def __init__(self) -> None:
                super().__init__()
                self.hidden = [keras.layers.Dense(units, activation=activation) for _ in range(3)]
                self.top = keras.layers.Dense(outputs)

            def call(self, x: Tensor, training: bool | None = None) -> Tensor:
                for stage, layer in enumerate(self.hidden):
                    with make.partition(stage):
                        x = layer(x)
                with make.partition(3):
                    return self.top(x)

        return MLP()

    return model


mlp = layers(16, "relu", 3)
wide = layers(32, "gelu", 24)  # many more units than a microbatch has examples


def skips(make: Maker) -> Any:
    """Every stage reads the outputs of all earlier ones."""

    class Skips(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stages = [keras.layers.Dense(8, activation="tanh") for _ in range(4)]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            seen = [x]
            for stage, layer in enumerate(self.stages):
                with make.partition(stage):
                    seen.append(layer(tf.concat(seen, axis=-1)))
            with make.partition(0):
                return seen[-1] + seen[1] * seen[2]

    return Skips()


def tied_kernel(make: Maker) -> Any:
    """An autoencoder: the last stage reads the variable of the first, transposed."""

    class Tied(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = keras.layers.Dense(6, use_bias=False)
            self.middle = keras.layers.Dense(6, activation="tanh")

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = tf.tanh(self.encoder(x))
            with make.partition(1):
                x = self.middle(x)
            with make.partition(2):
                return tf.matmul(x, tf.convert_to_tensor(self.encoder.kernel), transpose_b=True)

    return Tied()


def one_layer(num_calls: int) -> Any:
    """One layer called in several stages."""

    def model(make: Maker) -> Any:
        class Shared(make.Model):
            def __init__(self) -> None:
                super().__init__()
                self.shared = keras.layers.Dense(8, activation="tanh")
                self.own = [keras.layers.Dense(8) for _ in range(num_calls)]

            def call(self, x: Tensor, training: bool | None = None) -> Tensor:
                for stage, layer in enumerate(self.own):
                    with make.partition(stage):
                        x = layer(self.shared(x))
                return x

        return Shared()

    return model


def branches(make: Maker) -> Any:
    """Dicts and tuples in, dicts and tuples out."""

    class Branches(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.left = keras.layers.Dense(8, activation="relu")
            self.right = keras.layers.Dense(8, activation="tanh")
            self.join = keras.layers.Dense(8, activation="relu")
            self.heads = {"mean": keras.layers.Dense(3), "scale": keras.layers.Dense(2)}

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            with make.partition(0):
                left = self.left(inputs["left"])
            with make.partition(1):
                first, second = inputs["pair"]
                right = self.right(first) * second
            with make.partition(2):
                joined = self.join(tf.concat([left, right], -1))
            with make.partition(3):
                heads = {name: head(joined) for name, head in self.heads.items()}
                return heads, (left, [right * 2.0])

    return Branches()


def branches_batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=(size, *shape)).astype("float32")

    x = {"left": normal(5), "pair": (normal(4), normal(8))}
    return x, {"mean": normal(3), "scale": normal(2)}


def branches_loss(y: Mapping[str, Tensor], outputs: Any) -> Tensor:
    heads, (left, (right,)) = outputs
    losses = [mean_squared_error(y[name], heads[name]) for name in y]
    return tf.add_n(losses) + 0.1 * tf.reduce_mean(left * right)


def one_of_two_outputs(parts: Parts) -> StepFunction:
    """A loss that depends on one output only: the other head has no gradient, None."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            heads, _ = model(x, training=True)
            loss = mean_squared_error(y["mean"], heads["mean"])
        gradients = tape.gradient(loss, model.trainable_variables)
        assert sum(gradient is None for gradient in gradients) == 2
        return {"loss": loss, "heads": heads, "gradients": {"model": gradients}}

    return step


def frozen_stage(make: Maker) -> Any:
    model = mlp(make)
    model.hidden[1].trainable = False
    return model


def frozen_first_stages(make: Maker) -> Any:
    model = mlp(make)
    model.hidden[0].trainable = model.hidden[1].trainable = False
    return model


def stage_without_variables(make: Maker) -> Any:
    class WithoutVariables(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8, activation="relu")
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.first(x)
            with make.partition(1):
                x = tf.math.softplus(x) - tf.reduce_mean(x, axis=-1, keepdims=True)
            with make.partition(2):
                return self.last(x)

    return WithoutVariables()


def first_and_last_stage(make: Maker) -> Any:
    """Uses stages 0 and 3 of four: with three or four partitions one or two stay empty."""

    class FirstAndLast(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8, activation="relu")
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.first(x)
            with make.partition(3):
                return self.last(x)

    return FirstAndLast()


def nested_partitions(make: Maker) -> Any:
    """The innermost context wins, operations outside go to the default partition."""

    class Nested(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [keras.layers.Dense(8, activation="tanh") for _ in range(4)]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            x = self.parts[0](x)
            with make.partition(1):
                x = self.parts[1](x)
                with make.partition(2):
                    x = self.parts[2](x)
                x = x * tf.sigmoid(x)
            return self.parts[3](x)

    return Nested()


def _dense(name: str, parts: Any, **options: Any) -> Case:
    return Case(name, parts, vectors(8, 3), supervised(), **options)


CASES = (
    _dense("MLP", mlp, num_stages=4, evaluate=evaluation()),
    _dense("MLP, one partition", mlp, num_stages=4, layouts=(Layout(1, 1, "simple"),)),
    _dense("MLP, pattern 0-1-0-1", mlp, num_stages=4, layouts=CYCLIC),
    _dense(
        "MLP, automatic partitions",
        mlp,
        num_stages=4,
        layouts=(Layout(2, 4, "interleaved", "auto"), Layout(4, 3, "simple", "auto")),
    ),
    _dense(
        "forth and back",
        mlp,
        num_stages=4,
        layouts=tuple(
            Layout(2, 4, pipeline, pattern)
            for pipeline, pattern in (
                ("zb_v", "v"),
                ("v_half", "v"),
                ("v_min", "v"),
                ("dualpipe_v", "v"),
                ("zb_v", "auto"),
                ("zb_h2", "blocks"),
                ("breadth_first", "cyclic"),
                ("auto", "v"),
                ("auto", "blocks"),
            )
        ),
    ),
    _dense(
        "forth and back, other numbers",
        mlp,
        num_stages=4,
        layouts=(
            Layout(2, 5, "v_half", "v"),
            Layout(2, 3, "v_min", "v"),
            Layout(4, 5, "zb_h2"),
            Layout(3, 4, "zb_v", "v"),
        ),
    ),
    _dense("MLP, open batch size", mlp, num_stages=4, dynamic=True, evaluate=evaluation()),
    Case(
        "wide layers, joined gradients",
        wide,
        vectors(32, 24),
        supervised(),
        num_stages=4,
        layouts=JOINING,
        bound=JOINED,
        optimizer=momentum,
    ),
    Case(
        "wide layers, joined gradients, float64",
        lambda make: with_policy("float64", wide, make),
        vectors(32, 24, "float64"),
        supervised(),
        num_stages=4,
        layouts=JOINING,
        bound=JOINED_DOUBLE,
        optimizer=momentum,
    ),
    Case(
        "nested partition contexts",
        nested_partitions,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        layouts=TWO,
    ),
    Case(
        "skips between all stages",
        skips,
        vectors(8, 8),
        supervised(),
        num_stages=4,
        bound=SEVERAL_USES,
    ),
    Case("tied kernel", tied_kernel, vectors(8, 8), supervised(), num_stages=3, layouts=TWO),
    Case("layer called in two partitions", one_layer(2), vectors(8, 8), supervised()),
    Case(
        "layer called in four partitions",
        one_layer(4),
        vectors(8, 8),
        supervised(),
        num_stages=4,
        bound=SEVERAL_USES,
    ),
    Case(
        "many inputs and outputs, dicts and tuples",
        branches,
        branches_batch,
        supervised(branches_loss),
        num_stages=4,
    ),
    Case(
        "loss uses one of two outputs", branches, branches_batch, one_of_two_outputs, num_stages=4
    ),
    _dense("frozen stage", frozen_stage, num_stages=4),
    _dense("frozen first stages", frozen_first_stages, num_stages=4),
    _dense("stage without variables", stage_without_variables, num_stages=3, layouts=TWO),
    _dense("empty partitions", first_and_last_stage, num_stages=4),
    Case(
        "float64",
        lambda make: with_policy("float64", mlp, make),
        vectors(8, 3, "float64"),
        supervised(),
        num_stages=4,
    ),
    *(
        Case(
            policy,
            lambda make, policy=policy: with_policy(policy, mlp, make),
            vectors(8, 3),
            supervised(),
            num_stages=4,
        )
        for policy in ("mixed_float16", "mixed_bfloat16")
    ),
)
