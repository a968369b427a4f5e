"""What Keras writes of a model, written of a distributed one: whole, by one process, atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from opensmp import _private
from opensmp.errors import SavingError
from opensmp.saving import atomic, beside
from opensmp.saving.gather import gathered, state_of, together
from opensmp.saving.plain import input_specs, plain_calls, plain_class, plain_face

Model = Any
PathLike = str | os.PathLike[str]

_ENTRY = "saved_model.pb"


def write(model: Model, what: str, work: Callable[[Any], Any]) -> None:
    """Lets rank 0 write the plain face of a model, and tells all ranks how it went.

    Args:
        model: Any Keras model.
        what: What is done, for messages.
        work: Gets the model as its plain class, all its variables readable; runs on rank 0.

    Raises:
        SavingError: It cannot be written, on this rank or another.
    """
    if not model.built:
        raise SavingError(
            f"{what}: model '{model.name}' has no weights yet, for the shapes of its inputs are "
            "not known. Call it with one batch first."
        )

    def run() -> None:
        with gathered(state_of(model)) as mine:
            if mine:
                with plain_calls():
                    work(plain_face(model))

    together(what, run)


def write_saved_model(
    model: Model, path: PathLike, input_signature: Any = None, what: str = "model.save_model"
) -> None:
    """Writes a whole model as a TensorFlow SavedModel that knows nothing of partitions.

    The signatures `serving_default` and `serve` run the model in inference mode, for batches of
    any size; `variables` are its weights, in the order of the model.

    Args:
        model: A built Keras model.
        path: A directory. One that exists is kept, and only what is of the same name in it is
            replaced.
        input_signature: As in `keras.Model.export`; by default, the shapes and types that the
            model was called with.
        what: What is done, for messages.

    Raises:
        SavingError: It cannot be written.
    """

    def work(plain: Any) -> None:
        with atomic.new_directory(path, _ENTRY) as name:
            plain.export(
                name,
                format="tf_saved_model",
                verbose=False,
                input_signature=input_signature or _signature(model),
            )

    write(model, what, work)


def save(model: Model, path: PathLike, overwrite: bool, zipped: bool | None, **kwargs: Any) -> None:
    """As `keras.Model.save`; see `write`."""
    what, name = "model.save", os.fspath(path)
    _check_overwrite(what, name, overwrite)

    def work(plain: Any) -> None:
        with _private.compilation_kept(plain):
            write_one(plain)

    def write_one(plain: Any) -> None:
        if atomic.is_remote(name):
            plain.save(name, zipped=zipped, **kwargs)
        elif zipped is False:
            with atomic.new_directory(name, "config.json") as temporary:
                plain.save(temporary, zipped=False, **kwargs)
        else:
            with atomic.new_file(name) as temporary:
                plain.save(temporary, zipped=zipped, **kwargs)

    write(model, what, work)


def save_weights(
    model: Model, path: PathLike, overwrite: bool, max_shard_size: int | float | None, **kwargs: Any
) -> None:
    """As `keras.Model.save_weights`; see `write`."""
    what, name = "model.save_weights", os.fspath(path)
    _check_overwrite(what, name, overwrite)

    def work(plain: Any) -> None:
        if atomic.is_remote(name) or max_shard_size is not None:  # shards know their name
            plain.save_weights(name, max_shard_size=max_shard_size, **kwargs)
        else:
            with atomic.new_file(name) as temporary:
                plain.save_weights(temporary, **kwargs)
                beside.write(model, name, temporary)

    write(model, what, work)


def export(model: Model, path: PathLike, format: str, input_signature: Any, **kwargs: Any) -> None:
    """As `keras.Model.export`; see `write`."""
    if format == "tf_saved_model" and not kwargs and not atomic.is_remote(os.fspath(path)):
        write_saved_model(model, path, input_signature, "model.export")
        return

    def work(plain: Any) -> None:
        signature = input_signature or _signature(model)
        plain.export(path, format=format, verbose=False, input_signature=signature, **kwargs)

    write(model, "model.export", work)


def _signature(model: Model) -> Any:
    """The inputs of a model with a `call` of its own; Keras knows those of the others."""
    plain = plain_class(model) or type(model)
    if issubclass(plain, (keras.Sequential, _private.Functional)):
        return None
    specs = input_specs(model)
    return None if specs is None else list(specs)


def _check_overwrite(what: str, path: str, overwrite: bool) -> None:
    if not overwrite and not atomic.is_remote(path) and Path(path).exists():
        raise SavingError(f"{what}: {path} exists already. Give another path, or overwrite=True.")
