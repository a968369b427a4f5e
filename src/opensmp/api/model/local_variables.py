"""`smp.local_variables`: the variables of a model that this process owns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import is_keras, variable_name
from opensmp.distributed.world import current
from opensmp.errors import ElsewhereError, StepError


def local_variables(*several: Any) -> list[Any]:
    """Returns the variables that this process owns, for eager loops over variables.

    With one process these are all variables. With several, each process gets those of its own
    partitions, so that a loop that runs in all processes visits each variable once per replica.
    Given several models, such as a network and its moving average, it returns tuples of
    corresponding variables; models with equal layers are partitioned equally, so that corresponding
    variables are in the same process.

    It is not needed in a `train_step`, nor in a `tf.function` that contains an `smp.step`: all
    variables can be read there, and assignments run in the process that owns the variable.

    Args:
        *several: Models or layers, whose weights are taken, or lists of variables. All must have
            the same number of variables.

    Returns:
        A list of variables; a list of tuples, one variable from each argument, if several are
        given.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        StepError: An argument is not a collection of variables, the numbers of variables differ, or
            a variable is not built yet because its model has not been called.
        ElsewhereError: Corresponding variables are in different processes.

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
    """Raises `ElsewhereError` if corresponding variables are in different processes."""
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
