"""A callback that makes `fit` check values for being finite."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

from opensmp.errors import StepError
from opensmp.execution.emission.finite_checks import checking, is_asked_for


class CheckFinite(keras.callbacks.Callback):
    """Checks activations and gradients in one call of `fit`, like the `check_finite` setting.

    A batch with a nan or infinite activation or gradient ends `fit` with an
    `opensmp.NonFiniteError` that names the layer or variable, the partition and the microbatch. If
    `check_finite` is set in the configuration, the callback has no effect. With several processes,
    all must use it.

    Raises:
        StepError: It is not used in `fit` of an `smp.DistributedModel`.

    Example:
        ```python
        model.fit(images, labels, callbacks=[smp.CheckFinite()])
        ```
    """

    def set_model(self, model: Any) -> None:
        """Receives the model to train."""
        if not is_asked_for():
            raise StepError(
                "smp.CheckFinite: expected to be in the list of callbacks of a call of fit of an "
                f"smp.DistributedModel. Received the model {model!r} ({type(model).__name__}), "
                "which is no DistributedModel, or of which another method was called, or a "
                'CallbackList. Elsewhere use smp.init({"check_finite": True}).'
            )
        super().set_model(model)


def checking_if_asked(callbacks: Any) -> contextlib.AbstractContextManager[None]:
    """Context of a `fit` call that checks values if a CheckFinite is among the callbacks."""
    is_asked = any(isinstance(each, CheckFinite) for each in tf.nest.flatten(callbacks or ()))
    return checking() if is_asked else contextlib.nullcontext()
