"""Task models of KerasHub, fine-tuned by `fit` on the reference manual of Python."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from training.fixtures import assert_close, both
from turns import turn

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture
def text(monkeypatch):
    """The module that reads the text of the examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import text_data

    yield text_data
    sys.modules.pop("text_data")


def classifier() -> keras.Model:
    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=300, max_sequence_length=16, dropout=0.0, **SIZES
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=3, dropout=0.0)


def language_model() -> keras.Model:
    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=128, max_sequence_length=24, dropout=0.0, **SIZES
    )
    return keras_hub.models.GPT2CausalLM(backbone)


@turn(0, of=4)
def test_text_classifier(smp_init, text):
    smp_init({"partitions": 2, "microbatches": 2})
    words, chapters = text.load_paragraphs(length=16, vocabulary_size=300)
    inputs = {
        "token_ids": words[:60],
        "padding_mask": (words[:60] != text.PADDING).astype("int32"),
        "segment_ids": np.zeros_like(words[:60]),
    }

    def use(model):
        model.compile(optimizer=keras.optimizers.Adam(1e-3))  # loss and metrics of the task
        history = model.fit(
            inputs, chapters[:60], batch_size=16, epochs=3, shuffle=False, verbose=0
        )
        return history.history, model.predict(inputs, verbose=0)

    assert_close(*both(classifier, use), rtol=2e-4, atol=2e-5)


@turn(2, of=4)
def test_causal_language_model(smp_init, text):
    smp_init({"partitions": 2, "microbatches": 2})
    characters = text.load_characters(length=24, size=24 * 40)
    inputs = {
        "token_ids": characters[:, :-1],
        "padding_mask": np.ones_like(characters[:, :-1]),
    }
    weights = (np.arange(23) >= 8).astype("float32") * np.ones([40, 1], "float32")

    def use(model):
        model.compile(optimizer=keras.optimizers.Adam(1e-3), sampler="greedy")
        history = model.fit(
            inputs, characters[:, 1:], sample_weight=weights, batch_size=16, epochs=3, verbose=0
        )
        prompt = {"token_ids": characters[:2], "padding_mask": np.arange(24) < [[8], [10]]}
        written = model.generate(prompt, stop_token_ids=None)
        return history.history, model.evaluate(inputs, characters[:, 1:], verbose=0), written

    plain, ours = both(language_model, use)
    assert_close(plain[:2], ours[:2], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(plain[2]["token_ids"], ours[2]["token_ids"])
