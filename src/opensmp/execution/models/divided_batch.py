"""Finds model behaviour that differs when the model sees parts of a batch instead of all of it."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.compiler.trace.variables import is_keras, variable_name
from opensmp.errors import SmpError, StepError
from opensmp.execution.context import Prepare, Prepared

_logger = logging.getLogger("opensmp")

# Each microbatch improves the estimate that is their state; the documentation explains it.
_ESTIMATING = (keras.layers.BatchNormalization, keras.layers.SpectralNormalization)


class Division(NamedTuple):
    """How a batch is divided: among replicas, which share its rows, and microbatches in each."""

    microbatches: int
    replicas: int = 1

    @property
    def parts(self) -> int:
        """Number of parts that a batch is divided into."""
        return self.microbatches * self.replicas

    def __str__(self) -> str:
        if self.replicas == 1:
            return f"split into {self.microbatches} microbatches"
        among = f"divided among {self.replicas} replicas"
        if self.microbatches == 1:
            return among
        return f"{among}, and split into {self.microbatches} microbatches in each of them"

    @property
    def mend(self) -> str:
        """Instruction for the user to keep a batch whole."""
        one = '{"microbatches": 1} in smp.init'
        if self.replicas == 1:
            return one
        return "as many processes as partitions" + f", and {one}" * (self.microbatches > 1)


_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def prepare_divided(
    model: Any,
    prepare: Prepare,
    division: Division,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Prepared:
    """Calls `prepare` for one microbatch, and warns about state that microbatches change."""
    if division.parts == 1:
        return prepare(args, kwargs)
    try:
        prepared = prepare(args, kwargs)
    except SmpError:
        raise
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        rows = _num_rows((args, kwargs))
        if rows is None or not _names_rows(str(error), rows, division.parts):
            raise
        raise StepError(_about_rows(model.name, rows, division, error)) from error
    _warn_of_state(model, prepared.traced, division)
    return prepared


def _num_rows(nest: Any) -> int | None:
    for leaf in tf.nest.flatten(nest):
        shape = getattr(leaf, "shape", None)
        if shape is not None and len(shape) and shape[0] is not None:
            return int(shape[0])
    return None


def _names_rows(message: str, rows: int, parts: int) -> bool:
    """Whether an error is about the batch size: it says so, or quotes a shape with all rows."""
    if "batch size" in message.lower():
        return True
    least = max(rows + 1, (rows - 1) * parts + 1)  # microbatches may differ by a row
    firsts = re.findall(r"(?<!\w)[\[(](\d{1,9})\s*[,\])]", message)
    return any(least <= int(first) < (rows + 1) * parts for first in firsts)


def _about_rows(name: str, rows: int, division: Division, error: Exception) -> str:
    return (
        f"Model '{name}' cannot be called with a microbatch, which has {rows} "
        f"row{'s' * (rows > 1)}: a batch is {division}. Expected: "
        "layers that take any number of rows, or that of a microbatch. Received, from the model: "
        f"{error}\nWrite the number of rows of a microbatch where the model has that of a batch "
        f"(`batch_shape=({rows}, ...)`, an initial state, a reshape), better -1 or None, or use "
        f"{division.mend}."
    )


def _warn_of_state(model: Any, traced: TracedGraph, division: Division) -> None:
    """Logs once which variables get other values than from the whole batch."""
    warned = _warned.setdefault(model, set())
    found = {
        line: None
        for line in _lines(model, [variable for variable, _ in traced.updates])
        if line not in warned
    }
    if not found:
        return
    warned.update(found)
    _logger.warning(
        "model '%s': a batch is %s, and the model's call, once for each of them, changes what it "
        "keeps:\n%s\nThe numbers are those of plain Keras over the same parts of batches, not over "
        "whole ones.%s Where that is not meant, use %s, or change the variable outside of the "
        "call.",
        model.name,
        division,
        "\n".join(f"  - {line}" for line in found),
        " Each replica keeps its own; that of the first is saved." * (division.replicas > 1),
        division.mend,
    )


def _lines(model: Any, updated: list[Any]) -> Iterator[str]:
    layers = _private.all_layers(model)
    by_design = set(map(id, getattr(model, "metrics_variables", ())))
    of_estimates = (each.variables for each in layers if isinstance(each, _ESTIMATING))
    by_design.update(id(variable) for variables in of_estimates for variable in variables)
    # The states of a recurrent layer are not among its `variables`.
    states = {
        id(state): layer.name
        for layer in layers
        if getattr(layer, "stateful", False) is True
        for state in tf.nest.flatten(getattr(layer, "states", None))
    }
    for variable in updated:
        if id(variable) in states:
            yield (
                f"layer '{states[id(variable)]}' is stateful: each row goes on from the state of "
                "the same row of the microbatch before, not of the batch before"
            )
        elif id(variable) not in by_design and not _is_seed(variable):
            yield f"variable '{variable_name(variable)}' is assigned once per microbatch"


def _is_seed(variable: Any) -> bool:
    return is_keras(variable) and variable.name == "seed_generator_state"
