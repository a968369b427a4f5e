"""Histories of two trainings on real data: digits, and text.

    opensmp run -n 2 --partitions 1 --microbatches 4 histories.py FOLDER

leaves those of a split model in FOLDER.
"""

from __future__ import annotations

import functools
import pathlib
import pickle
import pydoc_data.topics
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

EPOCHS = 3
CONTEXT, CHARACTERS = 32, 64


class Training(NamedTuple):
    """A model, compiled, and what `fit` is given."""

    build: Callable[[], keras.Model]
    data: Callable[[], dict[str, Any]]


def digits_net() -> keras.Model:
    """Two convolutions and two dense layers."""
    images = keras.Input((28, 28, 1))
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(images)
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    x = keras.layers.Dense(32, activation="relu")(keras.layers.Flatten()(x))
    model = keras.Model(images, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    return model


@functools.cache
def digits() -> dict[str, Any]:
    """800 images of MNIST to train on, 200 to test; the last batch has 32."""
    sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
    try:
        from digits_data import load_digits
    finally:
        sys.path.pop()
    found = load_digits()
    return {
        "x": found.train_images[:800],
        "y": found.train_labels[:800],
        "validation_data": (found.test_images[:200], found.test_labels[:200]),
        "batch_size": 64,
    }


def text_net() -> keras.Model:
    """A decoder of two Transformer blocks that tells the next character."""
    tokens = keras.Input((CONTEXT,), dtype="int32")
    positions = keras.ops.arange(CONTEXT)
    x = keras.layers.Embedding(CHARACTERS, 32)(tokens)
    x = x + keras.layers.Embedding(CONTEXT, 32)(positions)
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(2, 16)(y, y, use_causal_mask=True)
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(32)(keras.layers.Dense(64, activation="gelu")(y))
    logits = keras.layers.Dense(CHARACTERS)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


@functools.cache
def text() -> dict[str, Any]:
    """The reference of Python's language, as Python's own `help` has it."""
    topics = pydoc_data.topics.topics
    words = "\n".join(topics[name] for name in ("assert", "class", "for", "function", "import"))
    alphabet = sorted(set(words))[: CHARACTERS - 1]
    numbers = np.array([alphabet.index(c) + 1 if c in alphabet else 0 for c in words], "int32")
    rows = np.lib.stride_tricks.sliding_window_view(numbers, CONTEXT + 1)[:: CONTEXT // 2][:240]
    return {"x": rows[:, :-1], "y": rows[:, 1:], "validation_split": 0.2, "batch_size": 48}


TRAININGS: Mapping[str, Training] = {
    "digits": Training(digits_net, digits),
    "text": Training(text_net, text),
}


def history(name: str, plain: bool = False) -> dict[str, list[float]]:
    """The history of three epochs."""
    keras.utils.set_random_seed(1)
    model = TRAININGS[name].build()
    if not plain:
        import opensmp as smp

        model = smp.DistributedModel.from_keras(model)
    keras.utils.set_random_seed(2)
    found: dict[str, list[float]] = model.fit(
        **TRAININGS[name].data(), epochs=EPOCHS, verbose=0
    ).history
    return found


def difference(plain: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """Relative differences of losses, absolute ones of accuracies; the largest of each."""
    assert list(plain) == list(ours)
    return {
        name: max(
            abs(a - b) / (1.0 if "accuracy" in name else abs(a))
            for a, b in zip(plain[name], ours[name], strict=True)
        )
        for name in plain
    }


def main(folder: pathlib.Path) -> None:
    import opensmp as smp

    smp.init()
    found = {name: history(name) for name in TRAININGS}
    (folder / f"{smp.rank()}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
