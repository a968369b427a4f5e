"""Calls of `tf.function`s: a hook around eager ones, and operations that call one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function.concrete_function import ConcreteFunction
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

from opensmp.base.types import Op, Tensor

_ORIGINAL = "_opensmp_original"

Around = Callable[[Any, Callable[[], Any]], Any]


def call_functions_by(around: Around) -> None:
    """Routes eager calls of all `tf.function`s through `around` from now on.

    A function may fail anywhere below a call that only the user's code makes, that of the outermost
    function. There is no public hook around that call.
    """
    for kind in (Function, ConcreteFunction):
        original = getattr(kind.__call__, _ORIGINAL, kind.__call__)
        kind.__call__ = _wrapped(original, around)


def _wrapped(original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return original(self, *args, **kwargs)
        return around(self, functools.partial(original, self, *args, **kwargs))

    setattr(call, _ORIGINAL, original)
    return call


_AttrValue = tf.compat.v1.AttrValue


class CallAttributes:
    """The attributes of operations that call a function, made once for all of its calls.

    Args:
        function: The function.
        settings: Those of `call_attributes`.
        gradient: Name of the gradient function of the operations.
    """

    def __init__(
        self, function: ConcreteFunction, settings: Mapping[str, Any], gradient: str
    ) -> None:
        self._name = function.name
        texts = {"config": "", **settings, "_gradient_op_type": gradient}
        values = {key: _AttrValue(s=tf.compat.as_bytes(text)) for key, text in texts.items()}
        for key, tensors in (("Tin", function.inputs), ("Tout", function.outputs)):
            types = [t.dtype.as_datatype_enum for t in tensors]
            values[key] = _AttrValue(list=_AttrValue.ListValue(type=types))
        values["f"] = _AttrValue()
        values["f"].func.name = function.name
        if all(t.shape.is_fully_defined() for t in function.outputs):
            # TensorFlow would infer the shapes of a call's results from the body of the function,
            # for each call anew, and again for a call of a function that contains the call.
            values["_disable_call_shape_inference"] = _AttrValue(b=True)
        self._values = values

    def call(self, function: ConcreteFunction, args: Sequence[Tensor], name: str) -> Op:
        """Adds a call to the current graph; tapes do not record it.

        `tf.raw_ops.PartitionedCall` would make and check all attributes anew for each call, which
        takes most of its time.
        """
        graph: Any = tf.compat.v1.get_default_graph()
        if not graph._is_function(self._name):
            function.add_to_graph(graph)
        op: Op = graph._create_op_internal("PartitionedCall", args, name=name, attrs=self._values)
        return op
