"""What a DistributedModel adds to Keras' trainer: how a step on one batch runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from opensmp import _private
from opensmp.runtime import world
from opensmp.training.functions import StepFunction
from opensmp.training.microbatches import num_rows
from opensmp.training.modes import current_mode
from opensmp.training.separate import NotSeparable, kind_of_model, loss_and_gradients
from opensmp.training.weighting import Kind


class Trainer:
    """The methods of Keras' trainer that a split model does in another way.

    Steps themselves are Keras' own, or those of the user's class: they run on whole batches, and
    a model that is called in them splits its batch into microbatches.
    """

    @property
    def supports_jit(self) -> bool:
        """False: XLA compiles for one device."""
        return False

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        """Keras sets it for each new layer."""

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
        attribute = f"{name}_function"
        if force or not isinstance(getattr(self, attribute), StepFunction):
            setattr(self, attribute, StepFunction(self, name))
        return getattr(self, attribute)

    def _smp_step(self, name: str) -> Callable[[Any], Any]:
        """What to do with one batch."""
        if name == "train" and current_mode() == "whole":
            kind = kind_of_model(self)
            if kind is not None:
                return functools.partial(self._smp_train_step, kind)
        return getattr(self, f"{name}_step")  # type: ignore[no-any-return]

    def _smp_train_step(self, kind: Kind, data: Any) -> Any:
        """Keras' own `train_step`, with the loss taken apart."""
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
