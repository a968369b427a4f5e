"""Traces of `tf.function`: cache keys, call attributes, AutoGraph and results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import attributes as attributes_lib
from tensorflow.python.eager.polymorphic_function import (
    autograph_util,
    concrete_function,
    function_context,
)

from opensmp.base.types import ConcreteFunction, Op

UNORDERED = {attributes_lib.DISABLE_ACD: True}
"""Attributes of a `tf.function` that adds no control dependencies between its operations."""

_UNSPECIALIZED = "_nospecialize"
_ALLOWLISTS = (
    "POLYMORPHIC_FUNCTION_ALLOWLIST",
    "TRACING_COMPILATION_ALLOWLIST",
    "MONOMORPHIC_FUNCTION_ALLOWLIST",
)


@contextlib.contextmanager
def unspecialized() -> Iterator[dict[str, Any]]:
    """Context with attributes for functions whose calls compute all results, read or not.

    Without them, the optimizer of function calls makes a variant of the function without the
    results that nothing reads, and fuses the operations that made them. The attribute is known to
    TensorFlow's runtime, but `tf.function` refuses it.
    """
    before = {name: getattr(attributes_lib, name) for name in _ALLOWLISTS}
    for name, known in before.items():
        setattr(attributes_lib, name, known | {_UNSPECIALIZED})
    try:
        yield {_UNSPECIALIZED: True}
    finally:
        for name, known in before.items():
            setattr(attributes_lib, name, known)


def variant_of(function: ConcreteFunction, attributes: Mapping[str, Any]) -> ConcreteFunction:
    """A function with the graph of another one and with other attributes.

    TensorFlow compiles the graph again, but it need not be traced again. The graph lives as long as
    the first function.
    """
    made = concrete_function.ConcreteFunction.from_func_graph(
        function.graph, function.function_type, dict(attributes), shared_func_graph=True
    )
    made._opensmp_graph_of = function
    return made


def call_attributes(one_thread: bool = False) -> dict[str, Any]:
    """The attributes that `tf.function` gives its calls, for calls through raw operations.

    They carry the settings of `tf.config.optimizer`; a call without them is optimized with the
    defaults. TensorFlow optimizes a function twice unless told otherwise. Once is enough for those
    that are called here, which have been optimized as parts of no other function: the second time
    takes as long and changes next to nothing.

    Args:
        one_thread: Whether to run the call's operations sequentially on the calling thread, with
            TensorFlow's single-threaded executor. It supports neither lowered control flow nor the
            temporary variables that the memory optimizer uses for large sums, which is switched
            off.
    """
    attributes = dict(context.context().function_call_options.as_attrs())
    attributes["config_proto"] = _config_of_call(attributes["config_proto"], one_thread)
    if one_thread:
        attributes["executor_type"] = "SINGLE_THREADED_EXECUTOR"
    return attributes


@functools.cache
def _config_of_call(serialized: bytes, one_thread: bool) -> bytes:
    config = tf.compat.v1.ConfigProto.FromString(serialized)
    rewrites = config.graph_options.rewrite_options
    if rewrites.meta_optimizer_iterations == type(rewrites).DEFAULT_NUM_ITERS:
        rewrites.meta_optimizer_iterations = type(rewrites).ONE
    if one_thread:
        rewrites.memory_optimization = type(rewrites).NO_MEM_OPT
    return bytes(config.SerializeToString())


_conditions: list[Callable[[], bool]] = []


def trace_apart_while(condition: Callable[[], bool]) -> None:
    """Makes `tf.function` use separate traces while `condition()` holds. Idempotent.

    TensorFlow's cache key has no public extension; without the addition, a function traced before
    would not be retraced.
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
    """The function converted by AutoGraph, as `tf.function` does it.

    The public `tf.autograph.to_graph` takes plain functions only, fails without source code, and
    shows generated files instead of the user's lines in errors.
    """
    converted = autograph_util.py_func_from_autograph(function, options)

    def call(*args: Any, **kwargs: Any) -> Any:
        # The enclosing tf.function is not converted, and would disable conversion of its callees.
        with ag_ctx.ControlStatusCtx(status=ag_ctx.Status.ENABLED, options=options):
            return converted(*args, **kwargs)

    return call


def hand_out_results(graph: Any) -> None:
    """Makes results of the traced function available on their own device as soon as computed.

    `tf.function` adds an identity to each result when its Python function has returned. This causes
    two problems once the function is inlined into another one:

    - An identity without a device runs on the first device, and every result is copied there and
      back. The device context below is left open on purpose, so that it applies when the identities
      are created; it ends with the graph.
    - The identity waits for all stateful operations of the function, such as an assignment at its
      end, so that the gradients of all microbatches are kept until then. These operations are
      control outputs: they run without that dependency, and later operations still wait for them.
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
