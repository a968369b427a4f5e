"""Runs a callback in rank 0 while the other processes serve its requests.

Files must be written once, but writing a model needs all processes, which hold its partitions.
While a callback runs in rank 0, the other processes wait for requests and take part in the model
methods that the callback calls.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from opensmp import _private
from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Model
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.distributed.watchdog.rank_error import from_rank
from opensmp.errors import StepError
from opensmp.execution.models.nested_models import PART
from opensmp.execution.models.plain_model import calls_are_plain, plain_calls
from opensmp.saving.gather import WRITER, gathered, state_of, together

_NAME = "a callback of rank 0"

_leading: ThreadValue[tuple[bool, Model]] = ThreadValue((False, None))
"""Whether this thread runs a callback in rank 0 alone, and the model of that callback."""

Method = TypeVar("Method", bound=Callable[..., Any])


def everywhere(method: Method) -> Method:
    """Decorator for a model method that all processes must call.

    If a callback that runs in rank 0 alone calls it, the other processes call it too, with the same
    arguments.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        leads, model = _leading.get()
        if not leads or calls_are_plain():
            return method(self, *args, **kwargs)
        index = _index_in(model, self, method.__name__)
        _tell(("call", method.__name__, args, kwargs, _is_optimizer_built(self), index))
        with _leading.set_to((False, None)):
            what = f"model.{method.__name__}"
            return together(what, lambda: method(self, *args, **kwargs))

    return call  # type: ignore[return-value]


def run_in_one(model: Model, what: str, work: Callable[[], Any], *, weights: bool = False) -> None:
    """Runs `work` in rank 0, assisted by the others; if it fails, all of them raise an error."""
    if world.current(what).rank == WRITER:
        _lead(model, work, weights)
    else:
        _follow(model, what, weights)


def is_leader() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return not world.is_initialized() or world.current("fit").rank == WRITER


def _lead(model: Model, work: Callable[[], Any], weights: bool) -> None:
    failure: str | None = "it ended"
    try:
        with contextlib.ExitStack() as stack:
            if weights:
                stack.enter_context(gathered(state_of(model)))
                stack.enter_context(plain_calls())
            stack.enter_context(_leading.set_to((True, model)))
            work()
        failure = None
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        _tell(("done", failure, bool(getattr(model, "stop_training", False))))


def _follow(model: Model, what: str, weights: bool) -> None:
    if weights:
        with gathered(state_of(model)):
            pass
    while True:
        request = objects.broadcast_object(None, _all(), WRITER, _NAME)
        if request[0] == "done":
            break
        _, name, args, kwargs, optimizer_is_built, index = request
        called = _models_in(model)[index]
        if optimizer_is_built and not _is_optimizer_built(called):
            called.optimizer.build(called.trainable_variables)
        work = functools.partial(getattr(called, name), *args, **kwargs)
        with contextlib.suppress(Exception):  # rank 0 gets the same error and reports the outcome
            together(f"model.{name}", work)
    _, failure, stops = request
    if failure is not None:
        raise from_rank(StepError(f"{what} failed in rank 0: {failure}"), WRITER)
    if stops:
        model.stop_training = True


def _models_in(model: Model) -> list[Model]:
    """A model and all its layers; partitioned models replace the layers that they stand for."""
    return [vars(layer).get(PART, layer) for layer in _private.all_layers(model)]


def _tell(request: tuple[Any, ...]) -> None:
    try:
        pickle.dumps(request)
    except Exception as error:
        raise StepError(
            f"A callback that runs in rank 0 alone called the model's {request[1]} with arguments "
            f"that cannot be sent to the other processes ({error}). Expected: arguments that can "
            "be pickled, such as the path of a file."
        ) from error
    objects.broadcast_object(request, _all(), WRITER, _NAME)


def _index_in(model: Model, called: Model, method: str) -> int:
    """Position of `called` in `_models_in(model)`; 0 for the model itself."""
    for index, each in enumerate(_models_in(model)):
        if vars(each) is vars(called):  # a view shares its model's attributes
            return index
    raise StepError(
        f"A callback that runs in rank 0 alone called {method} of model '{called.name}'. Expected: "
        f"methods of model '{model.name}', which is being trained, or of a model that it holds: "
        "the other processes know no other. Make the model an attribute of that one, or let the "
        "callback run in all ranks, without smp.OnRankZero."
    )


def _is_optimizer_built(model: Model) -> bool:
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and bool(optimizer.built)


def _all() -> range:
    return range(world.current(_NAME).size)
