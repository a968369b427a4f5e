"""Dry run: builds and traces a model without allocating its variables."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.trace import TracedGraph, trace
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.errors import PlanError

Nest = Any


def hide_gpus() -> None:
    """Prevents TensorFlow from allocating GPU memory, which a dry run does not need."""
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        logging.getLogger("opensmp").info("TensorFlow was used before; its GPUs stay visible")


def enter_world(config: Config) -> None:
    """Sets a world, so that factories can create `smp.DistributedModel`s; creates no devices."""
    if not world.is_initialized():
        world.set_current(world.World(config, ("/device:CPU:0",) * config.partitions))


def build_model(build: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> keras.Model:
    """Calls a model factory without allocating the variables of the model."""
    _check_arguments(build, arguments, name)
    try:
        with keras.StatelessScope(initialize_variables=False):
            model = build(**arguments)
    except Exception as error:
        if _private.is_variable_creation_error(error):
            raise PlanError(_cannot_wait(f"'{name}'")) from error
        raise PlanError(
            f"'{name}' failed while it made the model: {type(error).__name__}: {error}. A dry run "
            "calls it as it is: no weights can be loaded and no data read in it; pass what turns "
            "that off, such as --arg weights=null."
        ) from error
    finally:
        # Keras keeps a global list of unallocated variables and would allocate all of them when any
        # layer is called later.
        _private.take_pending_variables()
    return checked_model(model, name)


def checked_model(model: Any, name: str) -> keras.Model:
    """Returns `model`; raises `PlanError` if it is not a Keras model."""
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise PlanError(
            f"'{name}' gave a value of type {kind}. Expected: a keras.Model. Name a function that "
            "returns one, or a class that is one."
        )
    return model


def _check_arguments(build: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):
        return  # builtins may have no signature; the call will fail instead
    try:
        signature.bind(**arguments)
    except TypeError as error:
        required = [
            p.name
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        missing = [parameter for parameter in required if parameter not in arguments]
        mend = " ".join(f"--arg {parameter}=..." for parameter in missing) or "other --arg values"
        raise PlanError(
            f"'{name}' cannot be called with {dict(arguments)}: {error}. Its parameters are "
            f"{signature}. Add {mend}, or name a function without parameters that calls it."
        ) from error


def symbolic_inputs(model: keras.Model) -> Nest | None:
    """Symbolic inputs of a Functional or Sequential model as a nest; None if not built yet."""
    try:
        return model.input
    except (AttributeError, ValueError):
        inputs = getattr(model, "inputs", None)
        return inputs[0] if inputs and len(inputs) == 1 else inputs


def dry_trace(model: keras.Model, inputs: Nest, **kwargs: Any) -> TracedGraph:
    """Traces a call of a model, built or not, without allocating inputs or variables."""
    with _private.new_graph("dry_run").as_default():
        placeholders = tf.nest.map_structure(
            lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape), inputs
        )
    try:
        return trace(model, (placeholders,), kwargs, name=model.name)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        _private.take_pending_variables()
        if _private.is_variable_creation_error(error):
            raise PlanError(_cannot_wait(f"Model '{model.name}'")) from error
        shown = tf.nest.map_structure(lambda spec: f"{spec.dtype.name}{spec.shape}", inputs)
        raise PlanError(
            f"Model '{model.name}' cannot be called with one input {shown}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _cannot_wait(what: str) -> str:
    return (
        f"{what} makes variables that have a value from the start and so cannot wait for their "
        "memory: an optimizer, compile(), keras.Variable([1.0, 2.0]), or a layer without a build "
        "method that makes its weights when it is called. Take them out of what the dry run "
        "calls, or add --allocate to give all variables their memory."
    )
