"""Programs with KerasHub."""

from __future__ import annotations

import keras
import numpy as np
from programs.material import sums, words
from programs.registry import RANKS, program, refused

GENERATES = refused(
    RANKS,
    "ElsewhereError",
    "read in the tf.function 'generate_step'",
    "`generate` reads weights of other ranks in a `tf.function`; a copy by `get_weights` has them",
)


def language_model():
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16,
        dropout=0.0, max_sequence_length=8,
    )  # fmt: skip
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def compiled(model):
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    return model


@program("fit", policy="float32", bound=2e-3, why="float32", needs="keras_hub", refused=GENERATES)
def generation_between_fits(wrap):
    """KerasHub: a causal language model generates between its fits."""
    model = compiled(wrap(language_model()))
    return generating(model, lambda: model)


@program("fit", policy="float32", bound=2e-3, why="float32", needs="keras_hub")
def generation_by_a_copy(wrap):
    """KerasHub: between fits a plain copy with the weights of all ranks generates."""
    model, copy = compiled(wrap(language_model())), compiled(language_model())

    def updated():
        copy.set_weights(model.get_weights())  # in all ranks
        return copy

    return generating(model, updated)


def generating(model, generator):
    """Two fits, after each of which text is generated.

    Args:
        model: The model that is trained.
        generator: Gives the model that generates.
    """
    text = words(24, 8)
    mask = np.ones_like(text)
    x = {"token_ids": text[:, :-1], "padding_mask": mask[:, :-1]}
    prompt = {
        "token_ids": text[:2] * (np.arange(8) < 3),
        "padding_mask": mask[:2] * (np.arange(8) < 3),
    }
    histories, written = [], []
    for _ in range(2):
        histories.append(model.fit(x, text[:, 1:], batch_size=12, shuffle=False, verbose=0).history)
        written.append(generator().generate(prompt, stop_token_ids=None)["token_ids"])
    return {"histories": histories, "written": written, "weights": sums(model)}
