"""Traces of `tf.function`: what they depend on, how they are called, what they hand out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import autograph_util, function_context

Op = Any


def call_attributes(one_thread: bool = False) -> dict[str, Any]:
    """The attributes that `tf.function` gives to its calls, for calls through raw operations.

    They carry what the user set with `tf.config.optimizer`; a call without them is optimised
    by the defaults.

    Args:
        one_thread: Whether the operations of the call run one after the other on the thread
            that calls, by TensorFlow's single-threaded executor. It knows no lowered control
            flow, and none of the temporary variables by which the memory optimizer spreads out
            sums.
    """
    attributes = dict(context.context().function_call_options.as_attrs())
    if one_thread:
        config = tf.compat.v1.ConfigProto.FromString(attributes["config_proto"])
        rewrites = config.graph_options.rewrite_options
        rewrites.memory_optimization = type(rewrites).NO_MEM_OPT
        attributes["config_proto"] = config.SerializeToString()
        attributes["executor_type"] = "SINGLE_THREADED_EXECUTOR"
    return attributes


_conditions: list[Callable[[], bool]] = []


def trace_apart_while(condition: Callable[[], bool]) -> None:
    """Lets `tf.function` keep other traces while `condition()` holds; idempotent.

    What a trace depends on besides its arguments is a key of TensorFlow's own making;
    without an addition to it, a function traced before would not be traced again.
    """
    if condition not in _conditions:
        _conditions.append(condition)
    original = function_context.make_function_context
    if hasattr(original, "_smp_conditions"):
        return

    @functools.wraps(original)
    def make_function_context(*args: Any, **kwargs: Any) -> Any:
        context = original(*args, **kwargs)
        held = tuple(each for each in _conditions if each())
        return context._replace(context=(context.context, held)) if held else context

    make_function_context._smp_conditions = _conditions  # type: ignore[attr-defined]
    function_context.make_function_context = make_function_context


def with_autograph(function: Callable[..., Any], options: Any = None) -> Callable[..., Any]:
    """The function with Python control flow on tensors converted, as `tf.function` does it.

    The public `tf.autograph.to_graph` takes plain functions only, fails where there is no
    source code, and leaves generated files in the place of the user's lines in errors.
    """
    converted = autograph_util.py_func_from_autograph(function, options)

    def call(*args: Any, **kwargs: Any) -> Any:
        # The tf.function around it is not converted, and would forbid it to whatever it calls.
        with ag_ctx.ControlStatusCtx(status=ag_ctx.Status.ENABLED, options=options):
            return converted(*args, **kwargs)

    return call


def hand_out_results(graph: Any) -> None:
    """Gives the results of the function being traced to whoever reads them where and when made.

    `tf.function` adds an identity to each result when its Python function has returned. Two
    things are wrong with it once the function is inlined into another one:

    - an identity without a device runs on the first one, and every result travels there and
      back. The device context below is meant to be open still when the identities are made;
      it ends with the graph;
    - it waits for all that has effects in the function, such as an assignment at its end, and
      the gradients of all microbatches are held until then. What has effects runs without
      that, and what it must come before waits for it: it is among the control outputs.
    """

    def device(op: Op) -> str:
        in_place = op.type == "Identity" and not op.device
        return str(op.inputs[0].device if in_place else op.device)

    context = graph.device(device)
    context.__enter__()
    graph._smp_results_in_place = context
    graph.experimental_acd_manager._returned_tensors = _Nothing()


class _Nothing:
    """A set that stays empty."""

    def add(self, item: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())
