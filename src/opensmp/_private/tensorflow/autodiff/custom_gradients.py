"""Custom gradients of functions that read variables, while variables are inputs of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tensorflow.python.ops import custom_gradient as custom_gradient_lib
from tensorflow.python.util import tf_inspect

from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Tensor

Collect = Callable[[], AbstractContextManager[dict[int, Tensor]]]

_collect: ThreadValue[Collect | None] = ThreadValue(None)
_FOLLOWED = "_smp_follows_reads"


def reads_in_custom_gradients(collect: Collect) -> AbstractContextManager[None]:
    """Context in which values of variables that such a function reads are inputs of it.

    `tf.custom_gradient`, and `tf.recompute_grad`, find the `tf.Variable`s that a function reads,
    and pass gradients to these only. A placeholder of a variable's value would get none.

    Args:
        collect: Returns a context in which reads give those values, and which yields the values
            of trainable variables that are read in it, by id.
    """
    original = custom_gradient_lib._graph_mode_decorator
    if not hasattr(original, _FOLLOWED):
        custom_gradient_lib._graph_mode_decorator = _following(original)
    return _collect.set_to(collect)


def _following(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def decorate(f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        collect = _collect.get()
        if collect is None or kwargs:  # TensorFlow refuses keyword arguments in a graph
            return original(f, args, kwargs)
        with collect() as read:
            result, gradient = f(*args)
        values = [value for key, value in read.items() if all(value is not a for a in args)]
        if not values:
            return original(lambda *_: (result, gradient), args, kwargs)
        _check(gradient)

        def of_all(*upstream: Any) -> list[Any]:
            with collect():
                of_args, of_values = gradient(*upstream, variables=values)
            several = isinstance(of_args, (list, tuple))
            return [*(of_args if several else [of_args]), *of_values]

        return original(lambda *_: (result, of_all), (*args, *values), kwargs)

    setattr(decorate, _FOLLOWED, True)
    return decorate


def _check(gradient: Callable[..., Any]) -> None:
    found = tf_inspect.getfullargspec(gradient)
    if "variables" in (*found.args, *found.kwonlyargs) or found.varkw:
        return
    raise TypeError(
        "The gradient function of a tf.custom_gradient must take the keyword argument 'variables', "
        "since the function reads variables, or the function must take their values as arguments, "
        "as in `f(x, tf.convert_to_tensor(self.kernel))`."
    )
