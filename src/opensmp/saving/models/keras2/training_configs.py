"""Converts compile arguments and optimizer state of Keras 2 `.h5` files to Keras 3."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

Config = dict[str, Any]

# Keras 2 arguments that have no meaning in Keras 3, or are expressed elsewhere.
_SILENT = ("is_legacy_optimizer", "jit_compile", "decay", "schedule_decay", "dtype", "fn")
_STRINGS = ("accuracy", "acc", "crossentropy", "ce")


def compile_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `model.compile` from the `training_config` of a `.h5` file of any Keras."""
    arguments = {
        "optimizer": _optimizer(config["optimizer_config"]),
        "loss": _nest(_loss, config.get("loss")),
        "metrics": _nest(_metric, config.get("metrics")),
        "weighted_metrics": _nest(_metric, config.get("weighted_metrics")),
        "loss_weights": config.get("loss_weights"),
    }
    for name in ("run_eagerly", "steps_per_execution", "jit_compile", "auto_scale_loss"):
        if config.get(name) is not None:
            arguments[name] = config[name]
    return {name: value for name, value in arguments.items() if value is not None}


def _nest(make: Any, config: Any) -> Any:
    if isinstance(config, dict) and "class_name" not in config:
        return {name: _nest(make, each) for name, each in config.items()}
    if isinstance(config, (list, tuple)):
        return [_nest(make, each) for each in config]
    return make(config)


def _loss(config: Any) -> Any:
    if not isinstance(config, dict):
        return config  # a name, which compile resolves
    config = _plain(config)
    inner = config["config"]
    if not isinstance(inner, dict):
        return inner if config["class_name"] == "function" else keras.losses.deserialize(config)
    if inner.get("reduction") == "auto":
        inner["reduction"] = "sum_over_batch_size"
    if config["class_name"] == "LossFunctionWrapper":
        return inner["fn"]
    inner.pop("fn", None)
    return keras.losses.deserialize(config)


def _metric(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    config = _plain(config)
    inner = config["config"]
    if not isinstance(inner, dict):
        return inner if config["class_name"] == "function" else keras.metrics.deserialize(config)
    name = inner.get("name")
    if config["class_name"] == "MeanMetricWrapper":
        # compile resolves short names according to the output shapes.
        return name if name in _STRINGS else inner["fn"]
    if "module" not in config:
        inner.pop("fn", None)
    return keras.metrics.deserialize(config)


def _plain(config: Config) -> Config:
    return {**config, "config": _copied(config.get("config"))}


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _optimizer(config: Config) -> Any:
    """Creates an optimizer; Keras 2 arguments such as `lr` and `decay` are converted."""
    kind = config["class_name"].split(">")[-1]
    given = dict(config["config"])
    if "lr" in given:
        given["learning_rate"] = given.pop("lr")
    rate = given.get("learning_rate")
    if isinstance(rate, dict):
        given["learning_rate"] = keras.optimizers.schedules.deserialize(rate)
    elif decay := given.get("decay"):
        given["learning_rate"] = keras.optimizers.schedules.InverseTimeDecay(rate, 1, decay)
    if given.get("epsilon", 0) is None:
        given.pop("epsilon")
    owner = getattr(keras.optimizers, kind, None)
    if owner is None:
        return keras.optimizers.deserialize({**config, "config": given})
    if owner is keras.optimizers.LossScaleOptimizer:
        return keras.optimizers.deserialize(config)
    known = set(inspect.signature(owner.__init__).parameters)
    known |= set(inspect.signature(keras.optimizers.Optimizer.__init__).parameters)
    lost = {k: v for k, v in given.items() if k not in known and k not in _SILENT and v is not None}
    if lost:
        warnings.warn(
            f"smp.load_model: the file's optimizer {kind} has arguments that Keras 3 does not "
            f"know, which are left out: {lost}.",
            stacklevel=2,
        )
    return owner(**{name: value for name, value in given.items() if name in known})


def optimizer_values(
    saved: Sequence[tuple[str, Any]], variables: Sequence[Any], trained: Sequence[Any]
) -> list[Any] | None:
    """Maps optimizer state in a `.h5` file to an optimizer's variables; None if it does not fit.

    Keras 3 writes all variables in order. Keras 2 did not include the learning rate, and grouped
    slots by kind (for example all first moments, then all second moments), where Keras 3 groups
    them by variable. None stands for a variable that keeps its value.
    """
    shapes = [tuple(np.shape(value)) for _, value in saved]
    targets = [tuple(variable.shape) for variable in variables]
    if shapes == targets:
        return [value for _, value in saved]
    if len(shapes) < len(targets) and targets[: len(shapes)] == shapes == [()] * len(shapes):
        # For a compiled model without updates, Keras 3 writes only the variables that exist so far.
        return [*(value for _, value in saved), *[None] * (len(targets) - len(shapes))]
    if not saved or shapes[0] != ():
        return None
    own = [i for i, v in enumerate(variables) if v.path.endswith("learning_rate")]
    first = 1 + len(own)
    count = len(trained)
    rest, slots = [value for _, value in saved[1:]], targets[first:]
    if rest and np.shape(rest[0]) == () and own and slots and slots[0] != ():
        rest = rest[1:]  # the learning rate, included since Keras 2.11
    if not count or len(rest) != len(slots) or len(slots) % count:
        return None
    kinds = len(slots) // count
    wanted = [tuple(variable.shape) for variable in trained]
    by_kind = [shape for shape in wanted for _ in range(kinds)]  # grouped by variable
    if [tuple(np.shape(value)) for value in rest] == wanted * kinds and slots == by_kind:
        rest = [rest[kind * count + i] for i in range(count) for kind in range(kinds)]
    elif [tuple(np.shape(value)) for value in rest] != slots:
        return None
    return [saved[0][1], *[None] * len(own), *rest]
