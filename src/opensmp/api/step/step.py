"""`smp.step`: a training or evaluation step, pipelined over microbatches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.api.step.function_attributes import FunctionAttributes
from opensmp.api.step.split import explaining_sizes, freeze_sets, split_arguments, thaw_sets
from opensmp.api.step.step_arguments import check_arguments
from opensmp.api.step.step_output import Returned, Stacked, StepOutput, returns_terms
from opensmp.base.garbage import collected_once
from opensmp.compiler.lowering.sparse_gradients import SameRows
from opensmp.compiler.schedule.actions import Schedule
from opensmp.compiler.trace.structure import Structure
from opensmp.distributed import world
from opensmp.distributed.watchdog import recovery
from opensmp.errors import StepError
from opensmp.execution.autodiff.forward_mode import refuse_forward_mode
from opensmp.execution.context import current_runner
from opensmp.execution.emission.pipeline import Pipeline
from opensmp.execution.models.hooks import run_post_partition_hooks
from opensmp.execution.models.layer_calls import calls_taken
from opensmp.execution.models.registry import some_wait_for_partitions
from opensmp.execution.multi_process.remote_gradient import Made, pack
from opensmp.execution.multi_process.remote_values import note_step
from opensmp.execution.profiling.building import building, show_microbatch
from opensmp.execution.profiling.timestamps import Stamps, has_listeners
from opensmp.execution.warm_up import warming_up

P = ParamSpec("P")
Q = ParamSpec("Q")
Owner = TypeVar("Owner")
F = TypeVar("F", bound=Callable[..., Any])


def _not_converted(function: F) -> F:
    """Keeps AutoGraph out of a function, and its types."""
    result: F = tf.autograph.experimental.do_not_convert(function)
    return result


@overload
def step(function: Callable[P, Any]) -> Step[P]: ...


@overload
def step(
    *,
    non_split_inputs: Sequence[str] | None = None,
    input_split_axes: Mapping[str, int] | None = None,
    **tf_function_arguments: Any,
) -> Callable[[Callable[P, Any]], Step[P]]: ...


@overload
def step(
    function: Callable[P, Any],
    *,
    non_split_inputs: Sequence[str] | None = None,
    input_split_axes: Mapping[str, int] | None = None,
    **tf_function_arguments: Any,
) -> Step[P]: ...


def step(
    function: Callable[..., Any] | None = None,
    *,
    non_split_inputs: Sequence[str] | None = None,
    input_split_axes: Mapping[str, int] | None = None,
    **tf_function_arguments: Any,
) -> Any:
    """Decorator for the function of one forward (and backward) pass.

    The function is traced in graph mode, once per microbatch, and its calls of
    `smp.DistributedModel`s are pipelined over the partitions. Tensor
    arguments are split along axis 0; every returned tensor comes back as a
    `smp.StepOutput`. Post-processing of gradients and `apply_gradients` belong
    outside.

    Use it bare (`@smp.step`) or called (`@smp.step(non_split_inputs=["mask"])`).
    The decorated function may be called eagerly or inside a `tf.function`.

    Args:
        function: The function to decorate.
        non_split_inputs: Names of arguments that every microbatch gets whole.
        input_split_axes: Argument name to the axis along which to split it.
        **tf_function_arguments: Arguments of `tf.function`, such as
            `input_signature`, for the whole batch.

    Raises:
        StepError: if an argument is unknown, or the batch cannot be split.
        NotInitializedError: if the decorated function is called before `smp.init`.

    Example:
        ```python
        @smp.step
        def forward_backward(images, labels):
            with tf.GradientTape() as tape:
                predictions = model(images, training=True)
                loss = loss_fn(labels, predictions)
            return tape.gradient(loss, model.trainable_variables), loss

        gradients, loss = forward_backward(images, labels)
        gradients = [g.accumulate() for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        ```
    """
    if function is None:
        return functools.partial(
            step,
            non_split_inputs=non_split_inputs,
            input_split_axes=input_split_axes,
            **tf_function_arguments,
        )
    return Step(function, non_split_inputs or (), input_split_axes or {}, tf_function_arguments)


@dataclasses.dataclass(eq=False)
class _Compiled:
    """Compiled state of a step: for one object whose method it is, or for a plain function.

    Attributes:
        signature: Signature without `self`.
        world: The world for which it was compiled.
        functions: The `tf.function`s: by False for eager calls, True for calls inside a
            `tf.function`.
        schedule: The schedule of the latest trace.
    """

    signature: inspect.Signature
    world: world.World | None = None
    functions: dict[bool, Any] = dataclasses.field(default_factory=dict)
    schedule: Schedule | None = None


class Step(FunctionAttributes, Generic[P]):
    """A function decorated with `smp.step`; it has the attributes of a `tf.function`."""

    def __init__(
        self,
        function: Callable[..., Any],
        non_split_inputs: Sequence[str],
        input_split_axes: Mapping[str, int],
        tf_function_arguments: Mapping[str, Any],
    ) -> None:
        check_arguments(function, non_split_inputs, input_split_axes, tf_function_arguments)
        functools.update_wrapper(self, function)
        # tf.function would unwrap an object that has __wrapped__ and call the inner function.
        del self.__dict__["__wrapped__"]
        self.__signature__ = inspect.signature(function)
        self.python_function = function
        self._non_split_inputs = tuple(non_split_inputs)
        self._input_split_axes = dict(input_split_axes)
        self._tf_function_arguments = dict(tf_function_arguments)
        self._compiled = _Compiled(inspect.signature(function))
        self._of_objects: dict[int, tuple[Any, _Compiled]] = {}
        self._bind: Callable[[], Step[P]] = lambda: self

    def __repr__(self) -> str:
        return f"smp.step({getattr(self, '__name__', self.python_function)!r})"

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Step[P]: ...

    @overload
    def __get__(
        self: Step[Concatenate[Owner, Q]], instance: Owner, owner: type | None = None
    ) -> Step[Q]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Binds the step to an object as a method; the compiled functions live as long as it."""
        if instance is None:
            return self
        try:
            reference = weakref.ref(instance, lambda _: self._of_objects.pop(key, None))
        except TypeError:  # the object does not support weak references
            return types.MethodType(self, instance)
        key = id(instance)
        bound = copy.copy(self)
        bound.python_function = types.MethodType(self.python_function, instance)
        bound.__signature__ = inspect.signature(bound.python_function)
        if key not in self._of_objects:
            compiled = _Compiled(inspect.signature(bound.python_function))
            self._of_objects[key] = (reference, compiled)
        bound._compiled = self._of_objects[key][1]
        bound._bind = lambda: self.__get__(reference())
        return bound

    @_not_converted
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Runs the step on a whole batch."""
        with recovery.guard(), explaining_sizes():
            return self._call(args, kwargs)

    @tf.autograph.experimental.do_not_convert
    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = freeze_sets(args), freeze_sets(kwargs)
        if active := _private.accumulators():
            return self._call_under(active, args, kwargs)
        function = self._function()
        note_step()
        return function(*args, **kwargs)

    def _call_under(self, accumulators: list[Any], args: Any, kwargs: Any) -> Any:
        """Calls under a `tf.autodiff.ForwardAccumulator`; refuses if it watches an input."""
        with _private.without_accumulators():
            function = self._function()
            traced = function.get_concrete_function(*args, **kwargs)
        values = [(args, kwargs), traced.variables, traced.captured_inputs]
        refuse_forward_mode(accumulators, repr(self), values)
        with _private.without_accumulators():
            return function(*args, **kwargs)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the latest trace; `print` draws it.

        Raises:
            StepError: before the first call.
        """
        if self._compiled.schedule is None:
            raise StepError(f"{self!r} has no schedule yet: call it once.")
        return self._compiled.schedule

    def _functions(self) -> list[Any]:
        return [self._compiled.functions[joins] for joins in sorted(self._compiled.functions)]

    def _function(self) -> Any:
        """The `tf.function` for the current world and calling context; refuses invalid contexts."""
        here = world.current(f"the smp.step function '{getattr(self, '__name__', 'step')}'")
        if current_runner() is not None and not tf.executing_eagerly():
            raise StepError(
                f"{self!r} was called inside another smp.step function. Call the plain function "
                "instead, or call both steps one after the other."
            )
        if _private.tape_is_active():
            raise StepError(
                f"{self!r} was called under a tf.GradientTape. Gradients through a split model "
                "are taken inside the smp.step function: open the tape in it, take the gradient "
                "in it, and return the gradients."
            )
        if self._tf_function_arguments.get("jit_compile") and here.config.partitions > 1:
            raise StepError(
                f"{self!r}: jit_compile=True is not possible with {here.config.partitions} "
                "partitions: XLA compiles for one device. Leave jit_compile out."
            )
        if self._compiled.world is not here:
            self._compiled.world, self._compiled.functions = here, {}
        # An enclosing function prunes results that are not used, such as the gradients of each
        # microbatch where only sums are needed. An eager call computes and returns all of them.
        joins = not tf.executing_eagerly()
        if joins not in self._compiled.functions:
            self._compiled.functions[joins] = self._compile(here, joins)
        return self._compiled.functions[joins]

    def _compile(self, here: world.World, joins: bool) -> Any:
        """Creates the `tf.function` that splits the batch and traces all microbatches."""
        options = dict(self._tf_function_arguments)
        features = options.pop("experimental_autograph_options", None)
        autograph = options.pop("autograph", True)
        bind = self._bind  # not self, which would keep the bound object alive

        def whole_batch(*args: Any, **kwargs: Any) -> Any:
            bound = bind()
            function = bound.python_function
            if autograph:
                function = _private.with_autograph(function, features)
            name = f"step '{getattr(bound, '__name__', 'function')}'"
            with collected_once(), building(name, here, bound._compiled):
                return bound._trace(here, joins, function, args, kwargs)

        whole_batch.__name__ = f"smp_step_{getattr(self, '__name__', 'function')}"
        whole_batch.__signature__ = self._compiled.signature  # type: ignore[attr-defined]
        return tf.function(whole_batch, autograph=False, **options)

    def _trace(
        self,
        here: world.World,
        joins: bool,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Traces the function once per microbatch and emits the pipelined calls."""
        num_microbatches = here.config.microbatches
        batches = self._split(num_microbatches, args, kwargs)
        traces = None
        if some_wait_for_partitions(here):
            with warming_up(here, num_microbatches, joins) as traces, calls_taken():
                function(*batches[0][0], **batches[0][1])
        stamps = Stamps() if has_listeners() else None
        pipeline = Pipeline(here, num_microbatches, stamps, joins, traces)
        results = []
        with pipeline.tracing(), calls_taken():
            for microbatch, (part_args, part_kwargs) in enumerate(batches):
                show_microbatch(microbatch, num_microbatches)
                pipeline.start_microbatch(microbatch)
                with tf.name_scope(f"microbatch_{microbatch}"):
                    results.append(function(*part_args, **part_kwargs))
        outputs = self._collect(pipeline, results, joins)
        self._compiled.schedule = pipeline.schedule
        if stamps is not None:
            name = getattr(self, "__name__", "step")
            stamps.deliver(name, self.schedule.orders, here.devices, here.my_partitions)
        with tf.init_scope():
            run_post_partition_hooks()
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        pipeline.release()
        return outputs

    def _split(
        self, num_microbatches: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Binds the arguments and splits them; returns args and kwargs per microbatch."""
        bound = self._compiled.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = dict(bound.arguments)
        rest = next(
            (
                p.name
                for p in self._compiled.signature.parameters.values()
                if p.kind is p.VAR_KEYWORD
            ),
            None,
        )
        extra = named.pop(rest, {}) if rest is not None else {}
        twice = named.keys() & extra.keys()
        if twice:
            raise StepError(
                f"{self!r} has a positional-only argument and received a keyword argument of the "
                f"same name: {sorted(twice)}. Give one of them another name."
            )
        parts = split_arguments(
            {**named, **extra},
            num_microbatches,
            non_split_inputs=self._non_split_inputs,
            input_split_axes=self._input_split_axes,
        )
        batches = []
        for part in parts:
            bound.arguments.update({name: part[name] for name in named})
            if rest is not None:
                bound.arguments[rest] = {name: part[name] for name in extra}
            batches.append((thaw_sets(bound.args), thaw_sets(dict(bound.kwargs))))
        return batches

    def _collect(self, pipeline: Pipeline, results: Sequence[Any], joins: bool) -> Any:
        """Combines the results of all microbatches into one nest of step outputs."""
        nests = [tf.nest.map_structure(self._as_result, result) for result in results]
        for nest in nests[1:]:
            self._check_same_structure(nests[0], nest)
        leaves = list(zip(*map(tf.nest.flatten, nests), strict=True))
        devices = [getattr(row[0], "device", None) for row in leaves]
        rows = [row if _are_gradients(row) else () for row in leaves]
        rest = [
            leaf for row, chosen in zip(leaves, rows, strict=True) if not chosen for leaf in row
        ]
        terms = pipeline.terms(rows, Structure.of(rest).tensors)
        wanted = [[*row, *(more or ())] for row, more in zip(leaves, terms, strict=True)]
        flat = [t for row in wanted for leaf in row for t in Structure.of(leaf).tensors]
        finished = iter(pipeline.finish(flat))

        def finish(leaf: Any, made: Made) -> Any:
            parts = Structure.of(leaf)
            return pack(parts, [next(finished) for _ in parts.tensors], made)

        count, made = len(results), Returned if joins else StepOutput
        outputs = []
        for row, device in zip(wanted, devices, strict=True):
            placeholders: Made = {}  # the same for all microbatches
            values = [finish(leaf, placeholders) for leaf in row]
            singles, terms = values[:count], values[count:]
            stacked = Stacked.of(singles, terms) if joins else singles
            output = made(stacked, device or None, terms)
            outputs.append(None if row[0] is None else output)
        if joins:
            returns_terms(tf.compat.v1.get_default_graph())
        return tf.nest.pack_sequence_as(nests[0], outputs)

    def _as_result(self, leaf: Any) -> Any:
        """Converts a returned leaf to a tensor; None stays None."""
        if isinstance(leaf, SameRows):  # the outputs of all microbatches are concatenated later
            return tf.IndexedSlices(leaf.values, leaf.indices, leaf.dense_shape)
        if isinstance(leaf, (bool, int, float, complex, str, bytes, np.ndarray, np.generic)):
            return tf.convert_to_tensor(leaf)
        if isinstance(leaf, (tf.Variable, keras.Variable)):
            return tf.convert_to_tensor(leaf)
        if leaf is None or all(map(tf.is_tensor, tf.nest.flatten(leaf, expand_composites=True))):
            return leaf
        raise StepError(
            f"{self!r} returned {leaf!r} of type {type(leaf).__name__}. An smp.step function may "
            "return tensors, numbers, arrays and None, in lists, tuples and dicts. Return the "
            "tensors of the object instead."
        )

    def _check_same_structure(self, first: Any, other: Any) -> None:
        try:
            tf.nest.assert_same_structure(first, other, expand_composites=True)
            same = all(
                (a is None) == (b is None)
                for a, b in zip(tf.nest.flatten(first), tf.nest.flatten(other), strict=True)
            )
            detail = "" if same else "One of them has None where another has a tensor."
        except (ValueError, TypeError) as error:
            same, detail = False, str(error)
        if not same:
            raise StepError(
                f"{self!r} returned other structures for different microbatches. Return the same "
                f"nest of tensors each time. {detail}"
            )


def _are_gradients(leaves: Sequence[Any]) -> bool:
    """Whether all leaves are floating-point tensors or slices, so that they may be gradients."""
    return all(
        isinstance(leaf, (tf.Tensor, tf.IndexedSlices)) and leaf.dtype.is_floating
        for leaf in leaves
    )
