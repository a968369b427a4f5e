"""KerasHub backbones made from constructor arguments: each architecture, very small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from zoo.entry import Batch, Entry, distance_to_noise

VOCABULARY = 50
LENGTH = 12
SIDE = 32
HIDDEN = 32

_STACK = {"vocabulary_size": VOCABULARY, "num_layers": 4, "hidden_dim": HIDDEN}
_HEADS = {"num_heads": 4, "intermediate_dim": 64}
_GROUPED_HEADS = {"num_query_heads": 4, "num_key_value_heads": 2, "intermediate_dim": 64}
_POSITIONS = {"max_sequence_length": 16}


def _tokens(
    random: np.random.Generator, size: int, prefix: str = "", segments: bool = False
) -> dict[str, Any]:
    """Token sequences of different lengths, the first without padding."""
    ids = random.integers(1, VOCABULARY, size=(size, LENGTH)).astype("int32")
    ends = random.integers(LENGTH // 2, LENGTH, size=(size, 1))
    ends[0] = LENGTH
    mask = np.arange(LENGTH) < ends
    inputs = {f"{prefix}token_ids": ids * mask, f"{prefix}padding_mask": mask.astype("int32")}
    if segments:
        halves = np.broadcast_to(np.arange(LENGTH) >= LENGTH // 2, ids.shape)
        inputs[f"{prefix}segment_ids"] = halves.astype("int32")
    return inputs


def _text(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    return _tokens(random, size), ()


def _two_texts(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    return _tokens(random, size, segments=True), ()


def _source_and_target(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    inputs = _tokens(random, size, "encoder_") | _tokens(random, size, "decoder_")
    return inputs, ()


def _sound_and_text(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    sound = random.normal(size=(size, 2 * LENGTH, 8)).astype(keras.config.floatx())
    return {"encoder_features": sound, **_tokens(random, size, "decoder_")}, ()


def _image(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    return random.normal(size=(size, SIDE, SIDE, 3)).astype(keras.config.floatx()), ()


def _image_and_text(random: np.random.Generator, size: int) -> tuple[Any, Any]:
    ids = _tokens(random, size)["token_ids"]
    return {"images": _image(random, size)[0], "token_ids": ids}, ()


def _hub() -> Any:
    """KerasHub, imported when a backbone is made: it takes seconds."""
    import keras_hub

    return keras_hub.models


def _clip() -> keras.Model:
    hub = _hub()
    tower = {"hidden_dim": HIDDEN, "num_layers": 3, **_HEADS}
    vision = hub.CLIPVisionEncoder(patch_size=8, image_shape=(SIDE, SIDE, 3), **tower)
    text = hub.CLIPTextEncoder(
        vocabulary_size=VOCABULARY, embedding_dim=HIDDEN, max_sequence_length=LENGTH, **tower
    )
    return hub.CLIPBackbone(vision_encoder=vision, text_encoder=text, projection_dim=16)


# Class name without "Backbone" to its arguments and the batches it takes.
_MODELS: dict[str, tuple[Mapping[str, Any] | Callable[[], keras.Model], Batch]] = {
    "Albert": (_STACK | _HEADS | _POSITIONS | {"embedding_dim": 16}, _two_texts),
    "Bart": (_STACK | _HEADS | _POSITIONS, _source_and_target),
    "Bert": (_STACK | _HEADS | _POSITIONS, _two_texts),
    "Bloom": (_STACK | _HEADS, _text),
    "CLIP": (_clip, _image_and_text),
    "DebertaV3": (_STACK | _HEADS | _POSITIONS | {"bucket_size": 8}, _text),
    "Falcon": (_STACK | {"num_attention_heads": 4, "intermediate_dim": 64}, _text),
    "Gemma": (_STACK | _GROUPED_HEADS | {"head_dim": 8}, _text),
    "GPT2": (_STACK | _HEADS | _POSITIONS, _text),
    "Llama": (_STACK | _GROUPED_HEADS, _text),
    "Mistral": (_STACK | _GROUPED_HEADS | {"sliding_window": 4}, _text),
    "Mixtral": (_STACK | _GROUPED_HEADS | {"num_experts": 4}, _text),
    "OPT": (_STACK | _HEADS | _POSITIONS, _text),
    "ResNet": (
        {
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [3],
            "stackwise_num_filters": [64, 64],
            "stackwise_num_blocks": [2, 2],
            "stackwise_num_strides": [1, 2],
            "block_type": "basic_block",
            "image_shape": (SIDE, SIDE, 3),
        },
        _image,
    ),
    "Roberta": (_STACK | _HEADS | _POSITIONS, _text),
    "T5": (_STACK | _HEADS, _source_and_target),
    "ViT": (
        {
            "image_shape": (SIDE, SIDE, 3),
            "patch_size": (8, 8),
            "num_layers": 4,
            "num_heads": 4,
            "hidden_dim": HIDDEN,
            "mlp_dim": 64,
            "dropout_rate": 0.1,
            "attention_dropout": 0.1,
        },
        _image,
    ),
    "Whisper": (
        _STACK
        | _HEADS
        | {
            "num_mels": 8,
            "dropout": 0.1,
            "max_encoder_sequence_length": 2 * LENGTH,
            "max_decoder_sequence_length": LENGTH,
        },
        _sound_and_text,
    ),
}


def entry(name: str) -> Entry:
    """The entry of one backbone class, named without "Backbone"."""
    arguments, batch = _MODELS[name]

    def build() -> keras.Model:
        if callable(arguments):
            return arguments()
        return getattr(_hub(), f"{name}Backbone")(**arguments)

    return Entry(
        name=f"{name}Backbone",
        family="keras_hub",
        build=build,
        batch=batch,
        loss=distance_to_noise,
    )


BACKBONES = {f"{name}Backbone": entry(name) for name in _MODELS}
