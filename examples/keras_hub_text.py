"""Trains a text classifier and a causal language model of KerasHub, split in two partitions.

Both are made from constructor arguments, as nothing is downloaded, and trained with `fit` on the
reference manual of Python: which of three chapters is a paragraph from, and which character comes
next. With weights from elsewhere, `keras_hub.models.TextClassifier.from_preset(...)` takes the
place of the constructors; the rest stays.

    python examples/keras_hub_text.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

import opensmp as smp
from text_data import CHAPTERS, PADDING, load_characters, load_paragraphs

# Before anything else, because TensorFlow makes its devices once: at the first operation.
smp.init({"partitions": 2, "microbatches": 2})

LEAST_ACCURACY = 0.75
LARGEST_LOSS = 2.95  # nats per character; a guess of the frequency of each gives 3.2


def classify(epochs: int) -> float:
    """Trains the classifier; gives the part of paragraphs that it places right."""
    words, chapters = load_paragraphs()
    inputs = {
        "token_ids": words,
        "padding_mask": (words != PADDING).astype("int32"),
        "segment_ids": np.zeros_like(words),
    }
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=1000,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=words.shape[1],
    )
    plain = keras_hub.models.BertTextClassifier(backbone, num_classes=len(CHAPTERS))
    model = smp.DistributedModel.from_keras(plain)
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    test = len(words) // 5
    model.fit(
        {name: value[test:] for name, value in inputs.items()},
        chapters[test:],
        batch_size=32,
        epochs=epochs,
        verbose=2,
    )
    held_out = {name: value[:test] for name, value in inputs.items()}
    results = model.evaluate(held_out, chapters[:test], verbose=0, return_dict=True)
    print(f"{len(words) - test} paragraphs to learn from; of {test} others: {results}")
    model.summary()
    return float(results["sparse_categorical_accuracy"])


def write_on(epochs: int) -> float:
    """Trains the language model; gives its loss in nats per character."""
    characters = load_characters()
    inputs = {
        "token_ids": characters[:, :-1],
        "padding_mask": np.ones_like(characters[:, :-1]),
    }
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=128,
        num_layers=2,
        num_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        dropout=0.0,
        max_sequence_length=characters.shape[1],
    )
    model = smp.DistributedModel.from_keras(keras_hub.models.GPT2CausalLM(backbone))
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = model.fit(inputs, characters[:, 1:], batch_size=16, epochs=2 * epochs, verbose=2)
    return float(history.history["loss"][-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="twice as many of the second")
    epochs = parser.parse_args().epochs
    keras.utils.set_random_seed(1234)
    started = time.perf_counter()
    accuracy, loss = classify(epochs), write_on(epochs)
    print(f"accuracy {accuracy:.3f}, loss {loss:.2f}, {time.perf_counter() - started:.0f} s")
    return int(accuracy < LEAST_ACCURACY or loss > LARGEST_LOSS)


if __name__ == "__main__":
    sys.exit(main())
