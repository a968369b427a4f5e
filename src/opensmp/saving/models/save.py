"""Saves a distributed model in Keras' formats: gathered, written by rank 0, atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model, PathLike
from opensmp.errors import SavingError
from opensmp.execution.models.nested_models import plans_of_parts
from opensmp.execution.models.plain_model import input_specs, plain_calls, plain_class, plain_face
from opensmp.saving import atomic
from opensmp.saving.gather import gathered, state_of, together
from opensmp.saving.models import resume_state

_ENTRY = "saved_model.pb"


def write(model: Model, what: str, work: Callable[[Any], Any]) -> None:
    """Gathers a model, runs `work` on its plain view on rank 0, and propagates errors."""
    if not model.built and not plans_of_parts(model):
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
    model: Model,
    path: PathLike,
    input_signature: Any = None,
    what: str = "model.save_model",
    **kwargs: Any,
) -> None:
    """Writes a whole model as a TensorFlow SavedModel, independent of opensmp.

    The signatures `serving_default` and `serve` run the model in inference mode, for any batch
    size; `variables` are its weights, in the model's order. In an existing directory only files of
    the same names are replaced. Further arguments are those of `keras.Model.export`.
    """

    def work(plain: Any) -> None:
        with atomic.new_directory(path, _ENTRY) as place:
            plain.export(
                place,
                format="tf_saved_model",
                input_signature=input_signature or _signature(model),
                **{"verbose": False, **kwargs},
            )

    write(model, what, work)


def save(
    model: Model, path: PathLike, overwrite: bool, zipped: bool | None = None, **kwargs: Any
) -> None:
    """Like `keras.Model.save`; see `write`."""
    what, name = "model.save", os.fspath(path)
    check_overwrite(what, name, overwrite)

    def work(plain: Any) -> None:
        is_directory = zipped is False
        new = atomic.new_directory(name, "config.json") if is_directory else atomic.new_file(name)
        with _private.compilation_kept(plain), new as place:
            plain.save(place, zipped=zipped, **kwargs)

    write(model, what, work)


def save_weights(
    model: Model,
    path: PathLike,
    overwrite: bool,
    max_shard_size: int | float | None = None,
    **kwargs: Any,
) -> None:
    """Like `keras.Model.save_weights`; see `write`."""
    what, name = "model.save_weights", os.fspath(path)
    check_overwrite(what, name, overwrite)
    if not model.built and plans_of_parts(model):
        raise SavingError(
            f"{what}: Keras takes model '{model.name}' for one without weights, for its steps call "
            "its parts and never itself. Write `model.built = True` before, also before "
            "load_weights; or save the parts one by one; or use model.save."
        )

    def work(plain: Any) -> None:
        if max_shard_size is None:
            with atomic.new_file(name) as place:
                plain.save_weights(place, **kwargs)
                resume_state.write(model, name, place)
        else:  # several shards, and an index file that lists their names
            with _with_others(name) as place:
                plain.save_weights(place, max_shard_size=max_shard_size, **kwargs)

    write(model, what, work)


def write_json(model: Model, path: PathLike, weights: PathLike, what: str) -> None:
    """Atomically writes the configuration of a model, and its weights beside it."""

    def work(plain: Any) -> None:
        with _with_others(path) as place:
            plain.save_weights(os.path.join(os.path.dirname(place), os.path.basename(weights)))
            Path(place).write_text(plain.to_json(indent=1), encoding="utf-8")

    write(model, what, work)


def write_checkpoint(model: Model, path: PathLike, what: str) -> None:
    """Writes a TensorFlow checkpoint of a model and its optimizer."""

    def work(plain: Any) -> None:
        objects = {"model": plain}
        if getattr(plain, "optimizer", None) is not None:
            objects["optimizer"] = plain.optimizer
        with atomic.new_prefix(path, ".index") as prefix:
            tf.train.Checkpoint(**objects).write(prefix)

    write(model, what, work)


def export(model: Model, path: PathLike, format: str, input_signature: Any, **kwargs: Any) -> None:
    """Like `keras.Model.export`; see `write`."""
    if format == "tf_saved_model":
        write_saved_model(model, path, input_signature, "model.export", **kwargs)
        return

    def work(plain: Any) -> None:
        signature = input_signature or _signature(model)
        given = {"verbose": False, **kwargs}
        with _with_others(path) as place:
            plain.export(place, format=format, input_signature=signature, **given)

    write(model, "model.export", work)


@contextlib.contextmanager
def _with_others(path: PathLike) -> Iterator[str]:
    """`atomic.new_files` for a file and those that are written beside it; yields its place."""
    folder, name = os.path.split(os.fspath(path))
    with atomic.new_files(folder, name) as place:
        yield os.path.join(place, name)


def _signature(model: Model) -> Any:
    """Input specs of a model with its own `call`; None where Keras knows them."""
    plain = plain_class(model) or type(model)
    if issubclass(plain, (keras.Sequential, _private.Functional)):
        return None
    specs = input_specs(model)
    return None if specs is None else list(specs)


def check_overwrite(what: str, path: str, overwrite: bool, beside: Sequence[str] = ()) -> None:
    """Raises if the path, or a file beside it, exists and may not be replaced."""
    if overwrite or atomic.is_remote(path):
        return
    if any(Path(name).exists() for name in (path, *beside)):
        raise SavingError(f"{what}: {path} exists already. Give another path, or overwrite=True.")
