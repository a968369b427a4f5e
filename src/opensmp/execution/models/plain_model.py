"""The plain Keras model behind a distributed one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Model
from opensmp.errors import SavingError

_plain = ThreadValue(False)
_INPUTS = "_smp_inputs"


def plain_calls() -> AbstractContextManager[None]:
    """Context in which distributed models run as plain Keras models.

    Traces made inside contain no pipeline, no device placement and no partition tags.
    """
    return _plain.set_to(True)


def calls_are_plain() -> bool:
    """Whether models run as plain Keras models on this thread."""
    return _plain.get()


def plain_class(model: Model) -> Any | None:
    """The Keras class behind a distributed view; None for a model whose class defines `call`."""
    return getattr(type(model), "_smp_plain", None)


def plain_face(model: Model) -> Any:
    """The same model, with shared state, as an object of its plain Keras class.

    Returns objects that are not distributed views unchanged, such as models of a user's own class.
    """
    plain = plain_class(model)
    if plain is None:
        return model
    face = object.__new__(plain)
    # Keras' __setattr__ would store a tracked copy of the dictionary.
    object.__setattr__(face, "__dict__", model.__dict__)
    return face


def as_functional(model: Model) -> Any:
    """Converts a subclassed model to a Functional model that shares its layers and weights."""
    inputs, kind = _inputs(model), type(model).__name__
    try:
        with plain_calls():
            outputs = _call(model, inputs, None)
            functional = keras.Model(_structure(inputs), outputs, name=model.name)
            modes = [_operations(inputs, _call(model, inputs, mode)) for mode in (False, True)]
    except Exception as error:
        raise SavingError(_REFUSAL.format(name=kind, why=f" ({_first_line(error)})")) from (error)
    if modes[0] != modes[1] and _takes_training(model):
        why = ": it does other things in training than in inference, outside of its layers"
        raise SavingError(_REFUSAL.format(name=kind, why=why))
    there = {id(v) for v in functional.weights}
    lost = [v.path for v in model.weights if id(v) not in there]
    if lost:
        why = f": it uses weights outside of any layer, such as {lost[0]}"
        raise SavingError(_REFUSAL.format(name=kind, why=why))
    if model.compiled:
        compiled = keras.saving.deserialize_keras_object(model.get_compile_config())
        functional.compile(**{**compiled, "optimizer": model.optimizer})
    return functional


_REFUSAL = (
    "model.to_keras: the class {name} has a call of its own, which cannot be told as a Functional "
    "model of Keras layers and keras.ops{why}. Either make the same class once more with "
    "keras.Model as its base and give an object of it the weights, "
    "`plain.set_weights(model.get_weights())`; or keep a plain keras.Model and train "
    "smp.DistributedModel.from_keras(plain); or write a SavedModel, which holds any call: "
    "model.save_model(path)."
)


def _inputs(model: Model) -> tuple[Any, ...]:
    """Symbolic inputs with the specs of the first call."""
    specs = input_specs(model)
    if specs is None:
        raise SavingError(
            f"model.to_keras: model '{model.name}' has not been called yet, so that its inputs are "
            "not known. Call it with one batch first."
        )
    return tuple(
        tf.nest.map_structure(
            lambda spec: keras.Input(batch_shape=tuple(spec.shape), dtype=spec.dtype.name), spec
        )
        for spec in specs
    )


def _call(model: Model, inputs: tuple[Any, ...], training: bool | None) -> Any:
    return model.call(*inputs, **({"training": training} if _takes_training(model) else {}))


def _structure(inputs: tuple[Any, ...]) -> Any:
    return inputs[0] if len(inputs) == 1 else list(inputs)


def note_inputs(model: Model, args: tuple[Any, ...]) -> None:
    """Records shapes and dtypes of the inputs of a model's first call, for any batch size."""
    if _INPUTS in model.__dict__:
        return
    leaves = tf.nest.flatten(args)
    if leaves and all(tf.is_tensor(leaf) or isinstance(leaf, np.ndarray) for leaf in leaves):
        # Written to the dictionary itself, because Keras would track an attribute.
        model.__dict__[_INPUTS] = tuple(tf.nest.map_structure(_spec, arg) for arg in args)


def input_specs(model: Model) -> tuple[Any, ...] | None:
    """A nest of `tf.TensorSpec` for each positional argument of `call`; None if unknown."""
    noted: tuple[Any, ...] | None = model.__dict__.get(_INPUTS)
    if noted is not None:
        return noted
    config: Mapping[str, Any] = (model.get_build_config() if model.built else None) or {}
    if config.get("shapes_dict"):
        return tuple(_of_shape(shape, model) for shape in config["shapes_dict"].values())
    return (_of_shape(config["input_shape"], model),) if config.get("input_shape") else None


def _spec(leaf: Any) -> Any:
    shape = tf.TensorShape(leaf.shape)
    return tf.TensorSpec([None, *shape[1:]] if shape.rank else shape, leaf.dtype)


def _of_shape(shape: Any, model: Model) -> Any:
    if isinstance(shape, dict):
        return {name: _of_shape(each, model) for name, each in shape.items()}
    if all(size is None or isinstance(size, int) for size in shape):
        return tf.TensorSpec([None, *shape[1:]], model.input_dtype)
    return [_of_shape(each, model) for each in shape]


def _takes_training(model: Model) -> bool:
    return "training" in inspect.signature(model.call).parameters


def _operations(inputs: tuple[Any, ...], outputs: Any) -> list[str]:
    """Fingerprint of a symbolic call: its layers by identity, other operations by class."""
    functional = keras.Model(_structure(inputs), outputs)
    return [
        f"{type(operation).__name__} {id(operation)}"
        if isinstance(operation, keras.Layer)
        else type(operation).__name__
        for operation in functional.operations
        if not isinstance(operation, keras.layers.InputLayer)
    ]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
