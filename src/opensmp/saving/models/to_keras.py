"""`model.to_keras`: converts a distributed model to the plain Keras model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import keras

from opensmp import _private
from opensmp.base.types import Model
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.execution.models.plain_model import as_functional, plain_calls, plain_class, plain_face
from opensmp.saving.gather import WRITER, gathered, state_of, together


def to_keras(model: Model) -> Any:
    """See `DistributedModel.to_keras`."""
    plain = plain_face(model) if plain_class(model) is not None else as_functional(model)
    here = world.current("model.to_keras") if world.is_initialized() else None
    if here is None or here.size == 1:
        return plain
    data: list[bytes] = []

    def write() -> None:
        with gathered(state_of(plain)) as mine:
            if mine:
                data.append(_bytes_of(plain))

    together("model.to_keras", write)
    ranks = range(here.size)
    text = objects.broadcast_object(data[0] if data else None, ranks, WRITER, "model.to_keras")
    return _model_of(text, plain)


def _bytes_of(plain: Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder, plain_calls():
        path = Path(folder, "model.keras")
        plain.save(path)
        return path.read_bytes()


def _model_of(data: bytes, like: Model) -> Any:
    """Loads a model from the bytes of a `.keras` file, with the layer classes of `like`."""
    # For a part, `type` returns another class; see `opensmp.api.model.model_parts`.
    kinds = {layer.__class__.__name__: layer.__class__ for layer in _private.all_layers(like)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        path.write_bytes(data)
        # This program has just written it, so its Lambda layers are trusted.
        return keras.saving.load_model(path, custom_objects=kinds, safe_mode=False)
