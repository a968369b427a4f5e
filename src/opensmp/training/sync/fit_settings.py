"""Settings of a model and of a `fit` call that must be equal in all processes.

Each process trains its part of the model with its own optimizer. With another learning rate or
loss in one of them, training would silently produce wrong numbers.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import keras

from opensmp import _private
from opensmp.training.sync.description import (
    config_of,
    described,
    name_of,
    numbers_of,
    without_counters,
)

Settings = dict[str, "str | None"]
"""Maps the name of a setting to its description; None if this process does not know it yet."""

ONE_AHEAD = (
    "Look for code that depends on the rank, or an error that only one rank caught earlier: such "
    "a rank is one call ahead; share the outcome of each trial with smp.allgather."
)

_TRAINING = ("fit", "train_on_batch")
_PREDICTING = ("predict", "predict_on_batch")
_COMPILED = ("loss", "loss_weights", "metrics", "weighted_metrics", "steps_per_execution")
_VALUES = (
    "epochs",
    "batch_size",
    "steps_per_epoch",
    "steps",
    "shuffle",
    "class_weight",
    "validation_split",
    "validation_steps",
    "validation_batch_size",
    "validation_freq",
)
_PRESENCE = ("sample_weight", "validation_data")
_OF_OPTIMIZER = "the optimizer's "
_LONGEST = 160


def settings_of(model: Any, call: str, arguments: Mapping[str, Any] | None = None) -> Settings:
    """The settings that must be equal in all processes that make a call."""
    found: Settings = {"the method": call}
    if arguments is not None:
        found.update(_of_call(call, arguments))
    found["the layers"] = "\n".join(_layers(model)) or None
    found["the weights"] = "\n".join(_weights(model)) or None
    if call not in _PREDICTING:
        given = _private.compiled_with(model)
        found.update((name, described(given[name])) for name in _COMPILED if name in given)
    if call in _TRAINING:
        found["the seed"] = described(_private.global_seed())
        found.update(settings_of_optimizer(model))
    return found


def settings_of_optimizer(model: Any) -> Settings:
    """Class and configuration of the optimizer, with its current learning rate."""
    optimizer = getattr(model, "optimizer", None)
    found: Settings = {"the optimizer": "None" if optimizer is None else name_of(type(optimizer))}
    config = {**numbers_of(optimizer), **(config_of(optimizer) or {})}
    for name, value in config.items():
        if name != "name":
            found[_OF_OPTIMIZER + name] = described(value)
    return found


def digests(settings: Settings) -> dict[str, str | None]:
    """Digests of settings, which are cheap to send."""
    return {
        name: None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
        for name, text in settings.items()
    }


def different(found: Sequence[Mapping[str, str | None]]) -> list[str]:
    """Names of settings that differ between processes, ignoring those that are unknown (None)."""
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [each.get(name, "absent") for each in found] for name in names}
    result = [name for name in names if len({v for v in values[name] if v is not None}) > 1]
    if "the optimizer" in result:  # the configurations differ anyway
        result = [name for name in result if not name.startswith(_OF_OPTIMIZER)]
    return result


def difference(names: Sequence[str], found: Sequence[Settings]) -> str:
    """The error message about the settings in `names`; `found` has their descriptions by rank."""
    lines = []
    for name in names:
        texts = [each.get(name, "not given") for each in found]
        where, values = _first_difference([text or "not known yet" for text in texts])
        lines.append(f"    {name}{where}: {_by_rank(values)}")
    return (
        "The processes do not make the same call of fit, evaluate or predict. Expected: the same "
        "method of the same model, compiled and called in the same way, in all of them. "
        "Received:\n" + "\n".join(lines) + f"\n{ONE_AHEAD}"
    )


def _of_call(call: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    parameters = inspect.signature(getattr(keras.Model, call)).parameters
    for name in _VALUES:
        if name in parameters:
            yield name, described(arguments.get(name, parameters[name].default))
    for name in _PRESENCE:
        if name in parameters:
            yield name, "none" if arguments.get(name) is None else "given"


def _layers(model: Any) -> Iterator[str]:
    """Descriptions of all innermost layers, by class and configuration."""
    stack, seen = [model], {id(model)}
    while stack:
        parent = stack.pop()
        inner = [each for each in getattr(parent, "layers", ()) if id(each) not in seen]
        seen.update(map(id, inner))
        stack.extend(reversed(inner))
        yield from (described(each) for each in inner if not getattr(each, "layers", ()))


def _weights(model: Any) -> Iterator[str]:
    for weight in model.weights:
        trained = "trained" if weight.trainable else "not trained"
        yield f"{without_counters(weight.path)} {list(weight.shape)} {weight.dtype}, {trained}"


def _first_difference(texts: Sequence[str]) -> tuple[str, list[str]]:
    """Position and lines of the first difference of multi-line texts, cut around the difference."""
    tables = [text.split("\n") for text in texts]
    where = ""
    if max(map(len, tables)) > 1:
        rows = list(zip_longest(*tables, fillvalue="none"))
        number = next(i for i, row in enumerate(rows) if len(set(row)) > 1)
        where, texts = f", number {number + 1}", rows[number]
    if max(map(len, texts)) <= _LONGEST:
        return where, list(texts)
    columns = enumerate(zip_longest(*texts))
    first = next((i for i, column in columns if len(set(column)) > 1), 0)
    begin = max(0, first - _LONGEST // 2)
    return where, [
        "..." * (begin > 0)
        + text[begin : begin + _LONGEST]
        + "..." * (begin + _LONGEST < len(text))
        for text in texts
    ]


def _by_rank(values: Sequence[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value} in rank{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
        for value, own in ranks.items()
    )
