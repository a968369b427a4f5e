"""Programs with KerasHub."""

from __future__ import annotations

import keras
import numpy as np
from programs.material import sums, words
from programs.registry import program


@program("fit", policy="float32", bound=2e-3, why="float32", needs="keras_hub")
def generation_between_fits(wrap):
    """KerasHub: a causal language model generates between its fits."""
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16,
        dropout=0.0, max_sequence_length=8,
    )  # fmt: skip
    model = wrap(keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None))
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
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
        written.append(model.generate(prompt, stop_token_ids=None)["token_ids"])
    return {"histories": histories, "written": written, "weights": sums(model)}
