"""Checks the arguments of the decorator `smp.step`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp.errors import StepError


def check_arguments(
    function: Callable[..., Any],
    non_split_inputs: Sequence[str],
    input_split_axes: Mapping[str, int],
    tf_function_arguments: Mapping[str, Any],
) -> None:
    """Validates the arguments of the decorator; raises one `StepError` for all faults."""
    faults = []
    if not callable(function):
        raise StepError(
            f"smp.step: expected a function to decorate, received {function!r}. Write @smp.step "
            "above a function, or @smp.step(...) with keyword arguments only."
        )
    if isinstance(non_split_inputs, str):
        faults.append(
            f"non_split_inputs must be a list of argument names, received the string "
            f"{non_split_inputs!r}; write [{non_split_inputs!r}]"
        )
        non_split_inputs = ()
    if not isinstance(input_split_axes, Mapping):
        faults.append(
            "input_split_axes must be a dict from argument names to axes, such as "
            f'{{"images": 1}}, received {input_split_axes!r}'
        )
        input_split_axes = {}
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option, names in (
        ("non_split_inputs", non_split_inputs),
        ("input_split_axes", input_split_axes),
    ):
        for name in names:
            if name not in parameters and not takes_any:
                near = difflib.get_close_matches(str(name), parameters, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                faults.append(
                    f"{option} names {name!r}, but the function's arguments are "
                    f"{list(parameters)}{hint}"
                )
    for name, axis in input_split_axes.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            faults.append(f"input_split_axes[{name!r}] must be an integer, received {axis!r}")
        if name in non_split_inputs:
            faults.append(
                f"{name!r} is in non_split_inputs and in input_split_axes; name it in one of them"
            )
    known = [p for p in inspect.signature(tf.function).parameters if p != "func"]
    for name in tf_function_arguments:
        if name not in known:
            options = ["non_split_inputs", "input_split_axes", *known]
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(f"unknown argument {name!r}; accepted: {', '.join(options)}{hint}")
    if faults:
        raise StepError("smp.step:\n" + "\n".join(f"  - {fault}" for fault in faults))
