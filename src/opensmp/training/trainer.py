"""Overrides of Keras' trainer in DistributedModel: how a step on one batch runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.distributed import world
from opensmp.distributed.watchdog import recovery
from opensmp.errors import StepError
from opensmp.saving import own_weights
from opensmp.training.batch.batch_split import num_rows
from opensmp.training.batch.loss_reduction import Kind
from opensmp.training.batch.microbatched_loss import NotSeparable, kind_of_model, loss_and_gradients
from opensmp.training.call_mode import current_mode
from opensmp.training.callbacks.callbacks import shared_call
from opensmp.training.callbacks.check_finite import checking_if_asked
from opensmp.training.callbacks.rank_zero import everywhere
from opensmp.training.callbacks.watcher import watched
from opensmp.training.quantize import Quantize
from opensmp.training.resume.progress import progress_of
from opensmp.training.resume.resuming import is_resumable, resumable
from opensmp.training.step_functions import StepFunction
from opensmp.training.sync.sync import is_shared

_like = functools.partial(
    functools.wraps, assigned=[name for name in functools.WRAPPER_ASSIGNMENTS if name != "__doc__"]
)
"""Decorator: gives a method the signature of one of Keras, which may have lost its docstring."""


class Trainer:
    """The methods of Keras' trainer that a partitioned model overrides.

    Steps are Keras' own or those of the user's class. They run on whole batches; the model calls
    within them split the batch into microbatches.
    """

    @property
    def supports_jit(self) -> bool:
        """False: XLA compiles for one device."""
        return False

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        """Ignored; Keras sets it for each new layer."""

    @everywhere
    @_like(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Like `keras.Model.fit`; all processes call it with the same data."""
        return self._smp_share("fit", super().fit, args, kwargs)  # type: ignore[misc]

    @everywhere
    @_like(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Like `keras.Model.evaluate`; all processes call it with the same data."""
        return self._smp_share("evaluate", super().evaluate, args, kwargs)  # type: ignore[misc]

    @everywhere
    @_like(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Like `keras.Model.predict`; all processes call it with the same data and get all rows."""
        return self._smp_share("predict", super().predict, args, kwargs)  # type: ignore[misc]

    @everywhere
    def get_weights(self) -> list[Any]:
        """Like `keras.Model.get_weights`; all processes call it, and each gets the whole model."""
        if not is_shared():
            return super().get_weights()  # type: ignore[misc, no-any-return]
        return own_weights.values_of(self)

    @everywhere
    def set_weights(self, weights: Any) -> None:
        """Like `keras.Model.set_weights`; each process assigns those of its partitions."""
        with _private.assignments_elsewhere_ignored():
            super().set_weights(weights)  # type: ignore[misc]

    quantize = Quantize()

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls with batches; see `keras.Model`."""
        return self._smp_make("train", force)

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the function that `evaluate` calls with batches; see `keras.Model`."""
        return self._smp_make("test", force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes the function that `predict` calls with batches; see `keras.Model`."""
        return self._smp_make("predict", force)

    def _smp_make(self, name: str, force: bool) -> Any:
        _refuse_strategies(self)
        attribute = f"{name}_function"
        if force or not isinstance(getattr(self, attribute), StepFunction):
            setattr(self, attribute, StepFunction(self, name))
        return getattr(self, attribute)

    def _smp_share(
        self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls a method of Keras' trainer with arguments adapted to several processes."""
        progress = progress_of(self)
        with contextlib.ExitStack() as stack:
            if progress is not None:  # evaluate or predict, called while fit runs
                stack.enter_context(progress.paused())
            if not is_shared() and name != "fit":
                return run(*args, **kwargs)
            given = named_arguments(run, name, args, kwargs)
            resumes = name == "fit" and is_resumable(given)
            if name == "fit":
                stack.enter_context(checking_if_asked(given.get("callbacks")))
                stack.enter_context(watched(given.get("callbacks")))
            if not is_shared() and not resumes:
                return run(*args, **kwargs)
            arguments = given
            if is_shared():
                stack.enter_context(recovery.guard())
                arguments = stack.enter_context(shared_call(self, name, arguments))
            if resumes:
                arguments = stack.enter_context(resumable(self, given, arguments))
            return run(**_accepted(run, arguments))

    def _smp_step(self, name: str) -> Callable[[Any], Any]:
        """The function that runs one batch."""
        if name == "train" and current_mode() == "whole":
            kind = kind_of_model(self)
            if kind is not None:
                return functools.partial(self._smp_train_step, kind)
        return getattr(self, f"{name}_step")  # type: ignore[no-any-return]

    def _smp_train_step(self, kind: Kind, data: Any) -> Any:
        """Keras' `train_step`, with loss and gradients computed by microbatch."""
        model: Any = self
        here = world.current(f"training model '{model.name}'")
        try:
            found = loss_and_gradients(model, here, data, kind)
        except NotSeparable:
            return model.train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        _private.track_loss(model, found.loss, num_rows(x))
        weights = model.trainable_weights
        model.optimizer.apply_gradients(zip(found.gradients, weights, strict=True))
        return model.compute_metrics(x, y, found.outputs, sample_weight=sample_weight)


def _refuse_strategies(model: Any) -> None:
    strategy = model.distribute_strategy
    if tf.distribute.has_strategy() or strategy is not tf.distribute.get_strategy():
        raise StepError(
            f"Model '{model.name}' was made or is used in the scope of a "
            f"{type(strategy).__name__}. Expected: no tf.distribute strategy, as opensmp itself "
            "divides batches among replicas of a model. Leave the scope out, and start several "
            "processes for several replicas: `opensmp run -n 4 --partitions 2 script.py`."
        )


def named_arguments(
    run: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Maps the arguments of a call to their names."""
    signature = inspect.signature(run)
    if _takes(signature, inspect.Parameter.VAR_POSITIONAL):  # and passes them to Keras
        bound = inspect.signature(getattr(keras.Model, name)).bind(None, *args, **kwargs)
        del bound.arguments["self"]
    else:
        bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given


def _accepted(run: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a method accepts: a user's override may lack `verbose` or `callbacks`."""
    signature = inspect.signature(run)
    if _takes(signature, inspect.Parameter.VAR_KEYWORD):
        return dict(arguments)
    return {name: each for name, each in arguments.items() if name in signature.parameters}


def _takes(signature: inspect.Signature, kind: Any) -> bool:
    return any(parameter.kind is kind for parameter in signature.parameters.values())
