"""A callback that makes `fit` look for values that are not finite."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

from opensmp.errors import StepError
from opensmp.execution.emission.finite_checks import checking, is_asked_for


class CheckFinite(keras.callbacks.Callback):
    """Makes one call of `fit` check activations and gradients, as `check_finite` does everywhere.

    A batch in which an activation or a gradient is nan or infinite ends `fit` with an
    `opensmp.NonFiniteError`, which names the layer or the variable, the partition and the
    microbatch. With `check_finite` in the configuration the callback changes nothing. In several
    processes all have to give it.

    Raises:
        StepError: It is used elsewhere than in `fit` of an `smp.DistributedModel`.

    Example:
        ```python
        model.fit(images, labels, callbacks=[smp.CheckFinite()])
        ```
    """

    def set_model(self, model: Any) -> None:
        """Gets the model that is trained."""
        if not is_asked_for():
            raise StepError(
                "smp.CheckFinite: expected to be in the list of callbacks of a call of fit of an "
                f"smp.DistributedModel. Received the model {model!r} ({type(model).__name__}), "
                "which is no DistributedModel, or of which another method was called, or a "
                'CallbackList. Elsewhere use smp.init({"check_finite": True}).'
            )
        super().set_model(model)


def checking_if_asked(callbacks: Any) -> contextlib.AbstractContextManager[None]:
    """Context of a call of `fit` with these callbacks."""
    is_asked = any(isinstance(each, CheckFinite) for each in tf.nest.flatten(callbacks or ()))
    return checking() if is_asked else contextlib.nullcontext()
