"""`model.quantize` of a partitioned model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from opensmp.distributed import world
from opensmp.errors import StepError
from opensmp.saving.replicated_values import readable_everywhere
from opensmp.training.callbacks.rank_zero import everywhere

_MODES = ("int8", "int4", "float8")


class Quantize:
    """`quantize` of a `DistributedModel`: like that of `keras.Model`; all processes call it.

    With several processes, each temporarily needs host memory for the whole model, and modes that
    calibrate with data, such as "gptq", are rejected.

    A descriptor, because Keras sets an instance attribute of that name on each model, and a data
    descriptor of the class takes precedence over instance attributes.

    Raises:
        StepError: The mode calls single layers, which are spread over several processes; nothing
            was changed.

    Example:
        ```python
        model.fit(dataset)
        model.quantize("int8")
        model.predict(images)
        ```
    """

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self
        if "quantize" not in model.__dict__:  # Keras is about to set it
            return keras.Model.quantize.__get__(model)
        return functools.partial(quantize, model)

    def __set__(self, model: Any, method: Callable[..., Any]) -> None:
        model.__dict__["quantize"] = method


@everywhere
def quantize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Implements `model.quantize`."""
    what = f"quantizing model '{model.name}'"
    if world.current(what).size > 1:
        _refuse_calibration(model.name, args, kwargs)
    with readable_everywhere(model.variables, what):
        return model.__dict__["quantize"](*args, **kwargs)


def _refuse_calibration(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises StepError for modes of `quantize` that run the model's layers one by one, on data."""
    given = [*args[:2], kwargs.get("mode"), kwargs.get("config")]
    modes = {str(getattr(each, "mode", each)) for each in given if each is not None}
    unknown = modes - set(_MODES)
    if unknown:
        raise StepError(
            f"model.quantize: mode {', '.join(sorted(unknown))!r} of model '{name}' runs layers "
            "one by one, and these lie in several processes. Expected: one of "
            f"{', '.join(map(repr, _MODES))}; or quantize a whole copy in each process, "
            "`plain = model.to_keras()`. Nothing was changed."
        )
