"""`smp.local_variables`: the variables of a model that lie in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import is_keras, variable_name
from opensmp.distributed.world import current
from opensmp.errors import ElsewhereError, StepError

Variable = Any


def local_variables(*several: Any) -> list[Any]:
    """The variables that lie in this process, for loops that run eagerly.

    In one process these are all of them. In several each process has those of its own
    partitions, and a loop in all processes reaches each variable once in each replica. Given
    several models, such as a network and its moving average, it gives the variables that belong
    together; models of equal layers are cut equally, so that such variables lie together.

    In a `train_step`, and in a `tf.function` with an `smp.step` in it, it is not needed: there
    all variables can be read, and an assignment is done where the variable is.

    Args:
        *several: Models, layers, or lists of variables; of each its weights. They must have
            equally many.

    Returns:
        A list of variables; of tuples of variables, one of each, if several are given.

    Raises:
        NotInitializedError: Before `smp.init`.
        StepError: What was given are no variables, or not equally many, or variables that have no
            memory yet, since the model was not called.
        ElsewhereError: Variables that belong together lie in different processes.

    Example:
        ```python
        for a, b in smp.local_variables(target, online):
            a.assign(0.9 * a + 0.1 * b)
        ```
    """
    current("smp.local_variables")
    lists = [_variables(each) for each in several]
    counts = [len(each) for each in lists]
    if len(set(counts)) > 1:
        raise StepError(
            "smp.local_variables: expected models or lists with equally many variables, received "
            f"{', '.join(map(str, counts))}. Give it variables that belong together, one by one."
        )
    if len(lists) == 1:
        return [variable for variable in lists[0] if not _private.is_elsewhere(variable)]
    together = list(zip(*lists, strict=True))
    for group in together:
        _check(group)
    return [group for group in together if not any(map(_private.is_elsewhere, group))]


def _variables(given: Any) -> list[Variable]:
    found = getattr(given, "weights", None)
    if found is None:
        found = getattr(given, "variables", None)
    if found is None:
        found = given
    hint = "Expected: models, layers, or lists of Keras variables or tf.Variables."
    if is_keras(found) or isinstance(found, tf.Variable) or not isinstance(found, Iterable):
        raise StepError(f"smp.local_variables: received {type(given).__name__}. {hint}")
    variables = list(found)
    for variable in variables:
        if not is_keras(variable) and not isinstance(variable, tf.Variable):
            raise StepError(f"smp.local_variables: received {type(variable).__name__}. {hint}")
        if is_keras(variable) and not _private.is_initialized(variable):
            raise StepError(
                f"smp.local_variables: variable {variable_name(variable)} has no memory yet, since "
                "its model was not called. Call the model once before."
            )
    return variables


def _check(group: tuple[Variable, ...]) -> None:
    if len(current().mp_group) == 1:
        return
    homes = [_private.home_of(variable) for variable in group]
    places = {home.process for home in homes if home is not None}
    if len(places) > 1:
        names = " and ".join(
            f"{variable_name(variable)} on rank {current().mp_group[home.process]}"
            for variable, home in zip(group, homes, strict=True)
            if home is not None
        )
        raise ElsewhereError(
            f"smp.local_variables: variables that belong together lie in different processes: "
            f"{names}. Equal models are cut equally if each is an smp.DistributedModel of its own. "
            "Or write the loop in the train_step, or in the tf.function that calls the smp.step "
            "function: there all variables can be read."
        )
