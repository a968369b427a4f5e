"""The only module that touches private names of TensorFlow and Keras; each function says why.

Every name here has a canary test that fails clearly on a version that moved it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import backend as keras_backend
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import optimizer as keras_tf_optimizer
from keras.src.models.functional import Functional
from keras.src.ops.function import Function
from keras.src.ops.node import Node
from keras.src.optimizers import base_optimizer
from keras.src.saving import saving_lib, serialization_lib
from keras.src.trainers import compile_utils
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.core.protobuf import (
    cluster_pb2,
    config_pb2,
    rewriter_config_pb2,
    tensorflow_server_pb2,
    trackable_object_graph_pb2,
)
from tensorflow.python import pywrap_tfe
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.checkpoint import checkpoint as tf_checkpoint
from tensorflow.python.checkpoint import tensor_callable
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.eager import context, record, tape
from tensorflow.python.eager.polymorphic_function import autograph_util, function_context
from tensorflow.python.framework import auto_control_deps, ops
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.ops import handle_data_util, resource_variable_ops
from tensorflow.python.profiler.internal import flops_registry  # noqa: F401, fills a registry
from tensorflow.python.trackable import base as tf_trackable
from tensorflow.python.training.saving import saveable_object_util
from tensorflow.python.util import deprecation

from opensmp.errors import CheckpointError, ElsewhereError

Op = Any
Tensor = Any

_TAG = "_smp_partition"
_STRIPPED_ATTRIBUTES = ("_class", _TAG, "_gradient_op_type")

__all__ = ["Functional"]

# --- graphs -----------------------------------------------------------------


def new_graph(name: str) -> Any:
    """An empty function graph; a public `tf.Graph` cannot capture eager tensors."""
    return tf.__internal__.FuncGraph(name)


def captures(graph: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor outside, placeholder inside) that a function graph captured."""
    return list(graph.captures)


def is_stateful(op: Op) -> bool:
    """Whether an operation has state or side effects; public graphs do not say."""
    return bool(op._is_stateful)


@contextlib.contextmanager
def tagged(graph: Any, partition: int) -> Iterator[None]:
    """Marks all operations that `graph` makes inside with a partition number.

    The public ways (device scopes, name scopes) are either overwritten by the
    user's own or do not reach operations in library code.
    """
    with graph._attr_scope({_TAG: tf.compat.v1.AttrValue(i=partition)}):
        yield


def tag_of(op: Op) -> int | None:
    """The partition number an operation was marked with, or None."""
    try:
        return int(op.get_attr(_TAG))
    except ValueError:
        return None


def strip_attributes(node: Any) -> None:
    """Drops from a NodeDef what means something in the traced graph only."""
    for name in _STRIPPED_ATTRIBUTES:
        node.attr.pop(name, None)


def copy_handle_data(source: Tensor, target: Tensor) -> None:
    """Copies the element type of a variant or resource; without it gradients vanish."""
    if source.dtype in (tf.variant, tf.resource):
        handle_data_util.copy_handle_data(source, target)


def add_control_input(op: Op, before: Op) -> None:
    """Makes an existing operation wait; `tf.control_dependencies` reaches new ones only."""
    op._add_control_input(before)


def set_control_inputs(op: Op, before: Sequence[Op]) -> None:
    """Makes an operation wait for exactly these; graphs have no public way to cut edges."""
    op._remove_all_control_inputs()
    op._add_control_inputs(list(before))


def must_run(graph: Any, ops: Sequence[Op]) -> None:
    """Makes operations part of every run of a function graph under construction.

    TensorFlow itself does so for what it knows to have side effects, and must not be told
    again; collectives it drops when nothing reads their results.
    """
    graph.control_outputs.extend(
        op for op in ops if not is_stateful(op) or op.type.startswith("Collective")
    )


def replace_input(op: Op, index: int, tensor: Tensor) -> None:
    """Rewires one input of an existing operation."""
    op._update_input(index, tensor)


@contextlib.contextmanager
def automatic_control_dependencies() -> Iterator[None]:
    """Orders stateful operations as `tf.function` does, and restores an outer such context.

    The order must be known before a schedule is imposed on the graph, that is
    before `tf.function` itself would add it.
    """
    graph = tf.compat.v1.get_default_graph()
    flag, manager = graph._add_control_dependencies, graph.experimental_acd_manager
    try:
        with auto_control_deps.AutomaticControlDependencies():
            yield
    finally:
        graph._add_control_dependencies = flag
        graph.experimental_acd_manager = manager


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


# --- gradient tapes -----------------------------------------------------------


def tape_is_active() -> bool:
    """Whether any `tf.GradientTape` is recording now; there is no public question."""
    return bool(record.could_possibly_record())


def is_watched(tensor: Tensor) -> bool:
    """Whether an active tape would differentiate through `tensor`."""
    return bool(record.should_record_backprop([tensor]))


def stop_recording() -> Any:
    """Context without tapes; the public `tape.stop_recording` needs the tape at hand."""
    return record.stop_recording()


_BRIDGE = "OpensmpBridge"
_GRADIENTS = "_smp_gradients"


def with_gradient(
    results: Sequence[Tensor], args: Sequence[Tensor], gradient: Callable[..., Sequence[Any]]
) -> list[Tensor]:
    """Makes `gradient` the gradient of `results` with respect to `args`, in a graph.

    As `tf.custom_gradient`, which however registers each function for the life of the
    process: with it all that a trace holds would stay for ever. Here the functions belong
    to the graph.

    Args:
        results: Tensors that were computed from `args`.
        args: Tensors.
        gradient: Takes the gradient of each result, gives that of each argument or None.

    Returns:
        The results, to be used in place of the given ones.
    """
    graph = tf.compat.v1.get_default_graph()
    tensors = [*results, *args]

    def of_all(*upstream: Any) -> list[Any]:
        return [None] * len(results) + list(gradient(*upstream[: len(results)]))

    with graph.gradient_override_map({"IdentityN": _BRIDGE}):
        passed = tf.raw_ops.IdentityN(input=tensors, name="smp_bridge")
    for source, target in zip(tensors, passed, strict=True):
        copy_handle_data(source, target)
    if not hasattr(graph, _GRADIENTS):
        setattr(graph, _GRADIENTS, {})
    getattr(graph, _GRADIENTS)[passed[0].op.name] = of_all
    # To a tape the arguments do not pass: it would make zeros for each, in each microbatch.
    record.record_operation(_BRIDGE, passed[: len(results)], tensors, of_all)
    return list(passed[: len(results)])


@tf.RegisterGradient(_BRIDGE)
@tf.autograph.experimental.do_not_convert
def _bridge_gradient(op: Op, *upstream: Any) -> Any:
    if op is None:  # asked by tf.saved_model.save, which stores the gradients of all operations
        return None
    return getattr(op.graph, _GRADIENTS)[op.name](*upstream)


def is_bridge(op: Op) -> bool:
    """Whether an operation was made by `with_gradient`: result i is input i."""
    return op.name in getattr(op.graph, _GRADIENTS, ())


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Leaves all graphs under construction, as `tf.init_scope` does, but lets new tapes record.

    A model's own code, and custom gradients such as that of `tf.recompute_grad`, may
    open a tape; `tf.init_scope` would make it see nothing and give zeros.
    """
    with tf.init_scope(), recording():
        yield


# --- Keras variables ------------------------------------------------------------


def in_stateless_scope() -> bool:
    """Whether Keras runs functionally now (`stateless_call`, shape inference)."""
    return bool(keras_backend.in_stateless_scope())


def is_keras_tensor(value: Any) -> bool:
    """Whether a value is a symbolic Keras tensor."""
    return isinstance(value, keras.KerasTensor)


def is_initialized(variable: Any) -> bool:
    """Whether a Keras variable holds memory."""
    return variable._value is not None


def variable_dtype(variable: Any) -> Any:
    """The stored dtype; the public one follows the autocast scope."""
    return tf.as_dtype(variable._dtype)


def take_pending_variables() -> list[Any]:
    """Takes over Keras' list of variables that wait for their memory.

    Left in place, any unrelated layer call would initialise them all on the
    default device.
    """
    pending = global_state.get_global_attribute("uninitialized_variables") or []
    taken = list(pending)
    pending.clear()
    return taken


def _outside_of_functions() -> Any:
    """Context in which a new variable is none of the `tf.function` being traced.

    Such a function would otherwise trace the user's code a second time, to see that
    it makes no variables then.
    """

    def creator(next_creator: Any, **kwargs: Any) -> Any:
        return next_creator(**{**kwargs, "experimental_enable_variable_lifting": False})

    return tf.variable_creator_scope(creator)


def initialize_on(variable: Any, device: str) -> None:
    """Gives a waiting Keras variable its memory and first value on `device`."""
    with tf.init_scope(), tf.device(device), _outside_of_functions():
        variable._deferred_initialize()


def storage(variable: Any) -> Any:
    """The `tf.Variable` behind a Keras variable, untouched by autocast scopes."""
    return variable._value


def move_to(variable: Any, device: str) -> None:
    """Moves an initialised Keras variable to `device`, values kept.

    The `tf.Variable` stays the same object, only its memory is another: optimizers
    and checkpoints know a variable by the object. Functions traced before keep the
    old memory. Slots that optimizers have made for the variable move with it.
    """
    for slot in _slots(variable):
        move_to(slot, device)
    old = variable._value
    with tf.init_scope(), tf.device(device), _outside_of_functions():
        new = tf.Variable(
            old.read_value(),
            trainable=old.trainable,
            name=variable.name,
            dtype=old.dtype,
            aggregation=old.aggregation,
            synchronization=old.synchronization,
            shape=old.shape,
        )
    old._handle = new._handle
    old._handle_name = new._handle_name


def give_up(variable: Any, name: str) -> None:
    """Makes a Keras variable one that has no memory here, for it lives in another process.

    It keeps its place in models, optimizers and graphs; reading it here is an error that
    shows `name`. Slots that optimizers have made for the variable are given up with it.
    """
    for slot in _slots(variable):
        give_up(slot, name)
    with tf.init_scope(), tf.device("CPU:0"), _outside_of_functions():
        empty = resource_variable_ops.UninitializedVariable(
            trainable=variable.trainable,
            name=name,
            shape=variable._shape,
            dtype=variable_dtype(variable),
        )
    old = variable._value
    if old is None:
        variable._value = empty
        variable._initializer = None
    else:
        old._handle = empty._handle
        old._handle_name = empty._handle_name
    setattr(variable._value, _ELSEWHERE, name)
    kind: Any = type(variable._value)
    variable._value.__class__ = _unreadable(kind)


@functools.cache
def _unreadable(kind: Any) -> Any:
    """A class of variables that cannot be read outside of graphs.

    TensorFlow itself gives an empty array for a variable without memory, and no error.
    """

    def _read_variable_op(self: Any, *args: Any, **kwargs: Any) -> Any:
        if tf.executing_eagerly():
            raise ElsewhereError(
                f"Variable {getattr(self, _ELSEWHERE)} was read in a process that does not own "
                "it. Each process holds the variables of its own partitions only; the model's "
                "outputs and losses are there in all of them."
            )
        return kind._read_variable_op(self, *args, **kwargs)

    def _serialize_to_tensors(self: Any) -> Any:
        def read() -> Any:
            raise ElsewhereError(
                f"Variable {getattr(self, _ELSEWHERE)} cannot be saved in a process that does not "
                "own it: tf.train.Checkpoint would leave it out. Save with smp.CheckpointManager, "
                "which all processes call."
            )

        value = tensor_callable.Callable(read, dtype=self.dtype, device=self.device)
        return {tf_trackable.VARIABLE_VALUE_KEY: value}

    body = {
        "_read_variable_op": _read_variable_op,
        "_serialize_to_tensors": _serialize_to_tensors,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), body)


def is_elsewhere(variable: Any) -> bool:
    """Whether a variable, Keras' or the `tf.Variable` behind one, was given up."""
    return hasattr(getattr(variable, "_value", variable), _ELSEWHERE)


def _slots(variable: Any) -> list[Any]:
    """The variables that optimizers have made for a Keras variable."""
    slots = (reference() for reference in getattr(variable._value, _SLOTS, ()))
    return [slot for slot in slots if slot is not None]


_ELSEWHERE = "_smp_elsewhere"
_SLOTS = "_smp_slots"


def forget_compiled_functions(model: Any) -> None:
    """Makes `fit`, `evaluate` and `predict` of a model trace anew, and of models in it.

    Their functions hold on to the memory that variables had before they moved.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None


def get_mask(tensor: Tensor) -> Tensor | None:
    """The Keras mask that travels with a tensor."""
    return keras_backend.get_keras_mask(tensor)


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Lets a Keras mask travel with a tensor."""
    keras_backend.set_keras_mask(tensor, mask)


def get_logits(tensor: Tensor) -> Tensor | None:
    """The logits that Keras noted on a tensor of probabilities.

    Its cross-entropies compute with these instead of the probabilities, which makes a
    difference wherever a probability is small.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Tensor, logits: Tensor) -> None:
    """Notes the logits of a tensor of probabilities for Keras' cross-entropies."""
    tensor._keras_logits = logits


def regularization_losses(layer: Any) -> list[Tensor]:
    """Weight penalties alone; `layer.losses` mixes them with those of activations."""
    return list(layer._get_regularization_losses())


def order_losses(layer: Any) -> None:
    """Puts the losses that a StatelessScope has collected in the order of `layer.losses`.

    They come in the order of the layers' calls; Keras lists them layer by layer.
    """
    if in_stateless_scope():
        layers = [layer, *layer._flatten_layers(include_self=False)]
        collected = keras_backend.get_stateless_scope().losses
        collected[:] = [loss for each in layers for loss in each._get_own_losses()]


# --- hooks that live while a model is traced --------------------------------------


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces a method of a class for a while: `make(original)` gives the new one."""
    original = owner.__dict__[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def layer_calls(around: Callable[[Any], Any]) -> Any:
    """Context in which every Keras layer call runs inside `around(layer)`.

    Name scopes do not identify layers (shared layers, nested functions).
    """

    def make(original: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            with around(self):
                return original(self, *args, **kwargs)

        return __call__

    return replaced(keras.layers.Layer, "__call__", make)


def functional_nodes(around: Callable[[Any], Any]) -> Any:
    """Context in which each node of a Functional model runs inside `around(node)`.

    `around` is asked with the Node, as one layer may have several. Keras offers
    only the layer to its per-call hook, in the order of the nodes.
    """

    def make(original: Any) -> Any:
        def run(self: Any, inputs: Any, operation_fn: Any = None, call_fn: Any = None) -> Any:
            if call_fn is not None:
                return original(self, inputs, operation_fn or (lambda op: op), call_fn)
            depths = sorted(self._nodes_by_depth, reverse=True)
            nodes = itertools.chain.from_iterable(self._nodes_by_depth[d] for d in depths)
            waiting = iter([n for n in nodes if n.operation and not n.is_input])

            def in_context(operation: Any) -> Any:
                node = next(n for n in waiting if n.operation is operation)
                function = operation_fn(operation) if operation_fn else operation

                def call(*args: Any, **kwargs: Any) -> Any:
                    with around(node):
                        return function(*args, **kwargs)

                return call

            return original(self, inputs, in_context)

        return run

    return replaced(Function, "_run_through_graph", make)


def new_nodes(created: Callable[[Any], None]) -> Any:
    """Context in which `created(node)` is told of every new node of a Functional graph."""

    def make(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            created(self)

        return __init__

    return replaced(Node, "__init__", make)


@contextlib.contextmanager
def variable_access(
    read: Callable[[Any], Tensor | None], write: Callable[[Any, Tensor], bool]
) -> Iterator[None]:
    """Context in which reads and assignments of `tf.Variable`s are redirected.

    `read(variable)` gives the value to use, or None to leave the read alone;
    `write(variable, value)` says whether it took the assignment. Keras offers
    this for its own variables only (StatelessScope).
    """
    base = resource_variable_ops.BaseResourceVariable

    def reading(original: Any) -> Any:
        def _read_variable_op(self: Any, *args: Any, **kwargs: Any) -> Any:
            value = read(self)
            return original(self, *args, **kwargs) if value is None else value

        return _read_variable_op

    def gathering(original: Any, gather: Any) -> Any:
        def sparse_read(self: Any, indices: Any, name: Any = None) -> Any:
            value = read(self)
            return original(self, indices, name) if value is None else gather(value, indices)

        return sparse_read

    def assigning(original: Any, update: Any) -> Any:
        def assign(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            old = read(self)
            if old is not None:
                change = tf.convert_to_tensor(value, dtype=self.dtype)
                if write(self, update(old, change)):
                    return self
            return original(self, value, *args, **kwargs)

        return assign

    with contextlib.ExitStack() as stack:
        for name, make in {
            "_read_variable_op": reading,
            "sparse_read": lambda o: gathering(o, tf.gather),
            "gather_nd": lambda o: gathering(o, tf.gather_nd),
            "assign": lambda o: assigning(o, lambda old, new: tf.identity(new)),
            "assign_add": lambda o: assigning(o, lambda old, new: old + new),
            "assign_sub": lambda o: assigning(o, lambda old, new: old - new),
        }.items():
            owner = resource_variable_ops.ResourceVariable if "assign" in name else base
            stack.enter_context(replaced(owner, name, make))
        yield


# --- optimizers ---------------------------------------------------------------


def place_updates_with_variables() -> None:
    """Makes optimizer slots and update arithmetic sit on their variable's device.

    Keras asks the default strategy to keep them together, which it does not do:
    slots and arithmetic land on the first device. Idempotent.
    """
    extended = distribute_lib._DefaultDistributionExtended
    if getattr(extended, "_smp_placed", False):
        return
    update, colocate = extended._update, extended.colocate_vars_with

    def _update(self: Any, var: Any, fn: Any, args: Any, kwargs: Any, group: Any) -> Any:
        with tf.device(var.device):
            return update(self, var, fn, args, kwargs, group)

    def colocate_vars_with(self: Any, colocate_with_variable: Any) -> Any:
        device = getattr(colocate_with_variable, "device", None)
        return tf.device(device) if device else colocate(self, colocate_with_variable)

    extended._update, extended.colocate_vars_with = _update, colocate_vars_with
    extended._smp_placed = True
    _place_averages_and_clipping()
    _know_slots()
    _know_factors()
    _average_what_is_here()
    _leave_out_what_is_elsewhere()
    _scale_by_a_variable()
    _check_finite_together()


def _know_slots() -> None:
    """Lets variables know the slots that optimizers make for them; see `move_to`, `give_up`."""
    owner = base_optimizer.BaseOptimizer
    add = owner.add_variable_from_reference

    def add_variable_from_reference(
        self: Any, reference_variable: Any, *args: Any, **kwargs: Any
    ) -> Any:
        slot = add(self, reference_variable, *args, **kwargs)
        _know_slot(reference_variable, slot)
        return slot

    owner.add_variable_from_reference = add_variable_from_reference


def _know_slot(reference_variable: Any, slot: Any) -> None:
    value = getattr(reference_variable, "_value", reference_variable)
    if not hasattr(value, _SLOTS):
        setattr(value, _SLOTS, [])
    if any(known() is slot for known in getattr(value, _SLOTS)):
        return
    getattr(value, _SLOTS).append(weakref.ref(slot))
    if is_elsewhere(reference_variable):
        give_up(slot, getattr(value, _ELSEWHERE))


def _know_factors() -> None:
    """Makes the factors of Adafactor slots of their variables: it makes them without reference."""
    owner = keras.optimizers.Adafactor
    build, add = owner.build, owner.add_variable
    current = threading.local()

    class Followed(list[Any]):
        """The variables; notes which of them Keras is at."""

        def __iter__(self) -> Iterator[Any]:
            for variable in super().__iter__():
                current.variable = variable
                yield variable
            current.variable = None

    def build_followed(self: Any, var_list: Any) -> None:
        try:
            build(self, Followed(var_list))
        finally:
            current.variable = None

    def add_variable(self: Any, *args: Any, **kwargs: Any) -> Any:
        variable = getattr(current, "variable", None)
        if variable is None or not self.built:  # slots with a reference are made first
            return add(self, *args, **kwargs)
        stored = getattr(variable, "_value", variable)
        with tf.device(getattr(stored, "device", None)):
            slot = add(self, *args, **kwargs)
        _know_slot(variable, slot)
        return slot

    owner.build, owner.add_variable = build_followed, add_variable


def _average_what_is_here() -> None:
    """Lets ScheduleFreeAdamW begin at the weights that this process has; it copies all."""
    owner = keras.optimizers.ScheduleFreeAdamW
    build = owner.build

    def build_here(self: Any, var_list: Any) -> None:
        if self.built or not any(map(is_elsewhere, var_list)):
            build(self, var_list)
            return
        base_optimizer.BaseOptimizer.build(self, var_list)
        self._momentums, self._velocities = self.add_optimizer_variables(
            var_list, ["momentum", "velocity"]
        )
        for momentum, variable in zip(self._momentums, var_list, strict=True):
            if momentum is not None and not is_elsewhere(variable):
                self.assign(momentum, keras.ops.copy(variable))

    owner.build = build_here


def _scale_by_a_variable() -> None:
    """Makes graphs scale losses by a variable also before LossScaleOptimizer has made its own.

    Keras takes the first scale as a number then. A function that was traced once would use it
    for ever, while the gradients are divided by the scale of the moment.
    """
    owner = keras.optimizers.LossScaleOptimizer
    build, scale_loss = owner.build, owner.scale_loss
    early: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def scale_loss_early(self: Any, loss: Any) -> Any:
        if self.built or tf.executing_eagerly():
            return scale_loss(self, loss)
        if self not in early:
            with tf.init_scope(), tf.device("CPU:0"), _outside_of_functions():
                early[self] = tf.Variable(self.initial_scale, dtype="float32", trainable=False)
        return keras.ops.multiply(loss, tf.convert_to_tensor(early[self]))

    def build_late(self: Any, var_list: Any) -> None:
        build(self, var_list)
        known = early.pop(self, None)
        if known is not None:  # as in `move_to`: the same object has that memory now
            scale = self.dynamic_scale._value
            scale._handle, scale._handle_name = known._handle, known._handle_name
            scale._smp_known = known  # functions that read it must find it alive

    owner.build, owner.scale_loss = build_late, scale_loss_early


_agree_on_finite: Any = None


def agree_on_finite_with(agree: Callable[[Tensor], Tensor] | None) -> None:
    """Lets `agree` tell whether the gradients of all processes are finite; None: there is one.

    LossScaleOptimizer sees the gradients of this process only, and leaves a step out where one
    is not finite: some processes would do a step that others leave out.

    Args:
        agree: Takes whether the gradients of this process are finite, gives the same for all.
    """
    global _agree_on_finite
    _agree_on_finite = agree


def _check_finite_together() -> None:
    owner = keras.optimizers.LossScaleOptimizer
    check = owner.check_finite

    def check_finite(self: Any, grads: Any) -> Any:
        if _agree_on_finite is None:
            return check(self, grads)
        # What stands for a gradient of another process would become dense, and large, there.
        here = [g for g in grads if g is not None and not _has_no_rows(g)]
        return _agree_on_finite(check(self, here) if here else tf.constant(True))

    owner.check_finite = check_finite


def _has_no_rows(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices) and gradient.values.shape[:1] == [0]


def _leave_out_what_is_elsewhere() -> None:
    """Makes optimizers update only variables that have memory in this process."""
    owner = base_optimizer.BaseOptimizer
    keep = owner._filter_empty_gradients

    def _filter_empty_gradients(self: Any, grads: Any, vars: Any) -> Any:
        pairs = list(zip(grads, vars, strict=True))
        here = [(gradient, variable) for gradient, variable in pairs if not is_elsewhere(variable)]
        _note_places(self, pairs)
        if pairs and not here:
            _update_nothing(self)
            return [], []
        return keep(self, [gradient for gradient, _ in here], [variable for _, variable in here])

    owner._filter_empty_gradients = _filter_empty_gradients
    for base in (owner, keras_tf_optimizer.TFOptimizer):
        _overwrite_what_is_here(base)


def _overwrite_what_is_here(owner: Any) -> None:
    overwrite = owner._overwrite_model_variables_with_average_value

    def _overwrite_model_variables_with_average_value(self: Any, trainable_variables: Any) -> Any:
        averages = self._model_variables_moving_average
        here = [i for i, v in enumerate(trainable_variables) if not is_elsewhere(v)]
        if len(here) == len(trainable_variables):
            return overwrite(self, trainable_variables)
        self._model_variables_moving_average = [averages[i] for i in here]
        try:
            return overwrite(self, [trainable_variables[i] for i in here])
        finally:
            self._model_variables_moving_average = averages

    owner._overwrite_model_variables_with_average_value = (
        _overwrite_model_variables_with_average_value
    )


def _place_averages_and_clipping() -> None:
    """The same for moving averages and clipping, which Keras does without the strategy."""
    owner = base_optimizer.BaseOptimizer
    average, clip = owner._update_model_variables_moving_average, owner._clip_gradients

    def _update_model_variables_moving_average(self: Any, trainable_variables: Any) -> None:
        if not self.use_ema:
            return
        averages = self._model_variables_moving_average
        for variable, moving in zip(trainable_variables, averages, strict=True):
            if is_elsewhere(variable):
                continue
            one = types.SimpleNamespace(
                use_ema=True,
                ema_momentum=self.ema_momentum,
                iterations=self.iterations,
                _model_variables_moving_average=[moving],
            )
            with tf.device(variable._value.device):
                average(one, [variable])

    def _clip_gradients(self: Any, grads: Any) -> Any:
        if _clips_together(self):
            return _clip_together(list(grads), *_places[self], self.global_clipnorm)
        if not self.clipnorm and not self.clipvalue:  # nothing, or a norm over all gradients
            return clip(self, grads)
        clipped = []
        for gradient in grads:
            with tf.device(getattr(gradient, "device", None)):
                clipped += clip(self, [gradient])
        return clipped

    owner._update_model_variables_moving_average = _update_model_variables_moving_average
    owner._clip_gradients = _clip_gradients


_clip_together: Any = None
_places: weakref.WeakKeyDictionary[Any, tuple[list[int], int]] = weakref.WeakKeyDictionary()


def clip_with(clip: Callable[[list[Any], list[int], int, Any], list[Any]] | None) -> None:
    """Lets `clip` do what `global_clipnorm` asks optimizers for; None lets Keras do it.

    Keras knows the gradients of this process only, so that each would clip by another norm.
    Processes without any gradients call it as well.

    Args:
        clip: Takes the gradients, the place of each among those of all processes, the number
            of the latter, and the largest norm; gives the clipped gradients.
    """
    global _clip_together
    _clip_together = clip


def _clips_together(optimizer: Any) -> bool:
    wanted = optimizer.global_clipnorm and optimizer.global_clipnorm > 0
    return bool(_clip_together is not None and wanted and not optimizer.clipnorm)


def _note_places(optimizer: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Notes where, among all gradients of the model, those are that an optimizer clips."""
    all_of_them = [
        variable
        for gradient, variable in pairs
        if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
    ]
    places = [i for i, variable in enumerate(all_of_them) if not is_elsewhere(variable)]
    _places[optimizer] = places, len(all_of_them)


def _update_nothing(optimizer: Any) -> None:
    """Does what Keras leaves out where it has no gradient: its part in the others' step.

    That is to take part in their norm, and to go on with what belongs to no variable, such as
    the product of momenta that Nadam keeps.
    """
    clips = _clips_together(optimizer) and _places[optimizer][1]

    def take_part() -> None:
        if clips:
            _clip_together([], *_places[optimizer], optimizer.global_clipnorm)
        optimizer._backend_update_step([], [], optimizer.learning_rate)

    steps = optimizer.gradient_accumulation_steps
    if not steps:
        take_part()
    else:
        # The public `iterations` counts updates, this counts calls.
        is_update_step = (optimizer._iterations + 1) % steps == 0
        keras.ops.cond(is_update_step, take_part, lambda: None)


def functions_of(node: Any) -> Sequence[str]:
    """Names of the library functions that a NodeDef calls."""
    names = [value.func.name for value in node.attr.values() if value.HasField("func")]
    names += [f.name for value in node.attr.values() for f in value.list.func]
    return names


def in_symbolic_scope() -> bool:
    """Whether Keras runs a layer for its output shapes only, in a scratch graph."""
    return bool(keras_backend.in_symbolic_scope())


def is_variable_creation_error(error: Exception) -> bool:
    """Whether Keras refused to make a variable that cannot wait for its first value."""
    return "create a variable while in a stateless scope" in " ".join(str(error).split())


# --- traces of tf.function ------------------------------------------------------


def trace_apart_while(condition: Callable[[], bool]) -> None:
    """Lets `tf.function` keep other traces while `condition()` holds; idempotent.

    What a trace depends on besides its arguments is a key of TensorFlow's own making;
    without an addition to it, a function traced before would not be traced again.
    """
    original = function_context.make_function_context
    if getattr(original, "_smp_condition", None) is condition:
        return

    @functools.wraps(original)
    def make_function_context(*args: Any, **kwargs: Any) -> Any:
        context = original(*args, **kwargs)
        return context._replace(context=(context.context, condition)) if condition() else context

    make_function_context._smp_condition = condition  # type: ignore[attr-defined]
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


# --- costs ----------------------------------------------------------------------


class _Shapes:
    """Stands for a graph where TensorFlow's op statistics look up shapes by tensor name."""

    def __init__(self, shapes: Callable[[str], Sequence[int]]) -> None:
        self._shapes = shapes

    def get_tensor_by_name(self, name: str) -> Any:
        shape = tf.TensorShape(self._shapes(name))
        return types.SimpleNamespace(get_shape=lambda: shape)


def registered_flops(op: Op, inputs: Sequence[Any], outputs: Sequence[Any]) -> float | None:
    """FLOPs of an operation by the statistics of TensorFlow's own profiler.

    They have no public name, and take shapes from a graph, where some may be unknown.

    Args:
        op: The operation.
        inputs: Shape of each of its inputs, fully known.
        outputs: Shape of each of its outputs, fully known.

    Returns:
        None if there are no statistics for the type, or not for these attributes.
    """
    try:
        statistics = ops._stats_registry.lookup(f"{op.type},flops")
    except LookupError:
        return None
    shapes = {t.name: shape for t, shape in zip(op.inputs, inputs, strict=True)}
    shapes.update({t.name: shape for t, shape in zip(op.outputs, outputs, strict=True)})
    try:
        with deprecation.silence():  # they look shapes up by a function of TensorFlow 1
            return float(statistics(_Shapes(shapes.__getitem__), op.node_def).value)
    except ValueError:  # "Only NHWC format is supported in flops computations"
        return None


def has_registered_flops(op_type: str) -> bool:
    """Whether TensorFlow's profiler has FLOP statistics for operations of a type."""
    return f"{op_type},flops" in ops._stats_registry.list()


def function_graphs(op: Op, attribute: str) -> list[Any | None]:
    """The graphs of the functions that an attribute of a call, loop or branch names.

    None stands for a function whose graph is not known. A public graph gives functions as
    GraphDefs only, which have no shapes.
    """
    named = op.get_attr(attribute)
    graphs: list[Any | None] = []
    for function in named if isinstance(named, list) else [named]:
        try:
            graphs.append(op.graph._get_function(function.name).graph)
        except (AttributeError, ValueError):
            graphs.append(None)
    return graphs


def has_custom_gradient(op: Op) -> bool:
    """Whether an operation's gradient is a function given by the user or a library."""
    try:
        return bool(op.get_attr("_gradient_op_type"))
    except ValueError:
        return False


def eager_builds() -> Any:
    """Context in which layers run their `build` outside of any graph.

    A layer that computes a tensor in `build` and keeps it would keep a tensor of the graph
    that is current at its first call, of no use to any later one. Keras sets `build` on each
    layer object, so that it cannot be replaced in the class.
    """

    @contextlib.contextmanager
    def around(layer: Any) -> Iterator[None]:
        original = vars(layer).get("build")
        if layer.built or original is None:
            yield
            return

        @functools.wraps(original)
        def build(*args: Any, **kwargs: Any) -> Any:
            with tf.init_scope():
                return original(*args, **kwargs)

        vars(layer)["build"] = build
        try:
            yield
        finally:
            vars(layer)["build"] = original

    return layer_calls(around)


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


# --- several processes ------------------------------------------------------


def is_tensorflow_started() -> bool:
    """Whether TensorFlow has made its devices, after which no cluster can be joined."""
    return bool(context.context()._context_handle is not None)


def join_cluster(
    rank: int,
    addresses: Sequence[str],
    *,
    nccl: bool,
    heartbeat_seconds: float,
    join_seconds: float,
) -> None:
    """Starts TensorFlow's server and its multi-client collective runtime in this process.

    Returns when all processes are there. The only public way in, `MultiWorkerMirroredStrategy`,
    boots the same runtime but brings a strategy along, and leaves time limits and message
    sizes to chance.
    """
    leader = "/job:worker/replica:0/task:0"
    state = context.context()
    state.configure_collective_ops(
        collective_leader=leader,
        use_nccl_communication=nccl,
        device_filters=(f"/job:worker/task:{rank}",),
    )
    state.configure_coordination_service(
        service_type="standalone",
        service_leader=leader,
        heartbeat_timeout_in_ms=int(heartbeat_seconds * 1000),
        cluster_register_timeout_in_ms=int(join_seconds * 1000),
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(addresses))
        ],
    )
    state.coordination_service.cluster_register_with_barrier = True
    cluster = cluster_pb2.ClusterDef()
    cluster.job.add(name="worker", tasks=dict(enumerate(addresses)))
    server = tensorflow_server_pb2.ServerDef(
        cluster=cluster,
        default_session_config=state.config,
        job_name="worker",
        task_index=rank,
        protocol="grpc",
        port=int(addresses[rank].rsplit(":", 1)[1]),
    )
    # Without a limit large tensors travel in one piece, which was measured to be fastest.
    server.default_session_config.experimental.recv_buf_max_chunk = -1
    state.enable_collective_ops(server)
    state.ensure_initialized()


def answers(rank: int, seconds: float) -> bool:
    """Whether the TensorFlow server of another process answers.

    Its C++ threads answer also while its Python is busy, but not when the process is frozen.
    Python stands still in this process until the answer comes or the time is over.
    """
    try:
        context.context().check_collective_ops_peer_health(
            f"/job:worker/replica:0/task:{rank}", int(seconds * 1000)
        )
    except tf.errors.OpError:
        return False
    return True


def post(key: str, text: str) -> None:
    """Leaves a text for another process of the cluster, which gets it with `fetch`.

    The coordination service keeps it. Unlike a collective operation it may be used on any
    thread, whatever the others do.
    """
    context.context().set_config_key_value(key, text)


def fetch(key: str) -> str:
    """Waits for the text that another process posts, and forgets it; other threads run on."""
    text = str(context.context().get_config_key_value(key, 0))
    context.context().delete_config_key_value(key)
    return text


# --- checkpoints --------------------------------------------------------------


class CheckpointValue(NamedTuple):
    """A value that a `tf.train.Checkpoint` consists of.

    Attributes:
        key: Its key in the files, such as `"model/dense/_kernel/.ATTRIBUTES/VARIABLE_VALUE"`.
        slice_spec: The slice it is of a larger tensor; "" if it is the whole.
        owner: The object it belongs to: a variable, or an iterator, say.
        read: Gives its tensor now; None if the owner has no value yet.
    """

    key: str
    slice_spec: str
    owner: Any
    read: Callable[[], Tensor | None]


class CheckpointNode(NamedTuple):
    """An object of a checkpoint.

    Attributes:
        children: Name to number of the objects it refers to.
        keys: Name of each of its own values to the key in the files.
        has_registered_saver: Whether its values lie in files of another format.
    """

    children: dict[str, int]
    keys: dict[str, str]
    has_registered_saver: bool


OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


def checkpoint_values(checkpoint: Any) -> tuple[list[CheckpointValue], bytes]:
    """What `checkpoint.write` would write, and the object graph, without writing anything.

    The public `write` reads all variables, and writes at once and to one place.
    """
    tensors, _, savers, graph = checkpoint._saver._gather_serialized_tensors()
    if savers:
        names = ", ".join(sorted(savers))
        raise CheckpointError(
            f"The checkpoint has objects with savers of their own ({names}), which write files of "
            "another format. Save those objects apart from it."
        )
    values = []
    for owner, of_owner in tensors.items():
        if isinstance(owner, saveable_object_util.SaveableCompatibilityConverter):
            owner = owner.obj  # an iterator, say
        for key, parts in of_owner.items():
            if key == OBJECT_GRAPH_KEY:
                continue
            sliced = parts if isinstance(parts, dict) else {"": parts}
            values += [
                CheckpointValue(key, spec, owner, functools.partial(_tensor_to_save, part))
                for spec, part in sliced.items()
            ]
    return values, graph.SerializeToString()


def _tensor_to_save(value: Any) -> Tensor | None:
    return value if tf.is_tensor(value) else value.tensor


def checkpoint_nodes(object_graph: bytes) -> list[CheckpointNode]:
    """The objects of a checkpoint by number; number 0 is the root.

    Args:
        object_graph: The value at `OBJECT_GRAPH_KEY`.
    """
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(object_graph)
    return [
        CheckpointNode(
            {child.local_name: child.node_id for child in node.children},
            {value.name: value.checkpoint_key for value in node.attributes},
            bool(node.registered_saver.name),
        )
        for node in graph.nodes
    ]


def restore_where_values_are() -> None:
    """Lets `tf.train.Checkpoint.restore` leave out what lives in other processes; idempotent.

    It would read the values of all variables, and give memory to those that have none here.
    Values that were read before are taken from `values_at_hand`.
    """
    owner = tf_checkpoint._CheckpointRestoreCoordinator
    if getattr(owner, "_smp_restores", False):
        return
    restore = owner.restore_saveables

    def restore_saveables(self: Any, tensor_saveables: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {}
        for key, saveable in tensor_saveables.items():
            trackable = getattr(saveable, "_trackable", None)
            names = [spec.name for spec in saveable.specs]
            late = getattr(self, _LATE, None)
            if late is not None:
                late(names, trackable)
            if is_elsewhere(trackable):
                continue
            if all(_at_hand.get(name, self) is None for name in names):
                continue
            if trackable is None or not all(name in _at_hand for name in names):
                rest[key] = saveable
                continue
            # Each value goes as soon as it is assigned, so that none is held twice.
            values = [_at_hand.pop(name) for name in names]
            saveable.restore(values, None)
        return restore(self, rest, *args, **kwargs)

    owner.restore_saveables = restore_saveables
    owner._smp_restores = True


_at_hand: dict[str, Tensor | None] = {}
_LATE = "_smp_late"


def before_late_restores(status: Any, check: Callable[[list[str], Any], None]) -> None:
    """Has a function called before a value is assigned to an object made after the restore.

    Args:
        status: What `tf.train.Checkpoint.restore` returned.
        check: Gets the keys in the files and the object; may raise an error.
    """
    setattr(status._checkpoint, _LATE, check)


@contextlib.contextmanager
def values_at_hand(values: dict[str, Tensor | None]) -> Iterator[None]:
    """Context in which restoring a checkpoint takes these values instead of reading them.

    Args:
        values: Key in the files to value; None leaves the object as it is.
    """
    _at_hand.update(values)
    values.clear()
    try:
        yield
    finally:
        _at_hand.clear()


def iterator_state(iterator: Any) -> Tensor:
    """Where an iterator of a dataset is, as a checkpoint has it."""
    return iterator._serialize_to_tensors()["_STATE"]


def set_iterator_state(iterator: Any, state: Tensor) -> None:
    """Brings an iterator to where one of the same dataset was.

    Raises:
        tf.errors.OpError: The state is that of another dataset.
    """
    iterator._restore_from_tensors({"_STATE": state})


class HeldBackRestores:
    """Values of checkpoints that wait for objects made in a model that is being traced.

    TensorFlow assigns such a value when the variable is attached to its layer, at which moment
    the variable has no memory yet, and no device.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Context in which nothing is restored."""

        def make(original: Any) -> Any:
            def _handle_deferred_dependencies(owner: Any, name: str, trackable: Any) -> None:
                self._waiting.append((owner, name, trackable))

            return _handle_deferred_dependencies

        with replaced(tf_trackable.Trackable, "_handle_deferred_dependencies", make):
            yield

    def release(self, model: Any) -> None:
        """Restores what has waited.

        Args:
            model: The model, whose variables have their places now.
        """
        restore_where_values_are()
        waiting, self._waiting = self._waiting, []
        for owner, name, trackable in waiting:
            owner._handle_deferred_dependencies(name, trackable)
        model._maybe_initialize_trackable()
        if _OTHER_VARIABLES in model._deferred_dependencies:
            children = model._trackable_children()
            if _OTHER_VARIABLES in children:
                others = children[_OTHER_VARIABLES]
                model._handle_deferred_dependencies(_OTHER_VARIABLES, others)


_OTHER_VARIABLES = "variables"


class _OtherVariables(tf.__internal__.tracking.Trackable):
    """The variables of a Keras model that TensorFlow does not find by its attributes.

    Each has its place in `model.variables` as its name.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        model = self._model()
        if model is None or not model.built:
            return {}
        found = _found_by_attributes(model)
        return {str(i): v for i, v in enumerate(model.variables) if id(v) not in found}


def _found_by_attributes(model: Any) -> set[int]:
    """Ids of all objects that belong to a model for TensorFlow, without its optimizer."""
    found: set[int] = {id(model)}
    stack = [model]
    while stack:
        children = tf.train.TrackableView.children(stack.pop())
        for child in children.values():
            skipped = (_OtherVariables, base_optimizer.BaseOptimizer)
            if id(child) not in found and not isinstance(child, skipped):
                found.add(id(child))
                stack.append(child)
    return found


def track_all_variables(kind: Any) -> None:
    """Lets checkpoints of models of a class have all variables; idempotent.

    TensorFlow finds the objects that are attributes of each other. Keras keeps layers of
    Functional and Sequential models, and those in lists, otherwise, and so it does the seeds of
    dropout: plain checkpoints of such models have only what the optimizer knows.
    """
    if "_trackable_children" in vars(kind):
        return

    def _trackable_children(self: Any, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        children = super(kind, self)._trackable_children(save_type, **kwargs)
        if save_type != "checkpoint":
            return children
        kept = _other_variables.setdefault(self, _OtherVariables(self))
        # Those that call this to look for others are in the midst of looking.
        if not getattr(_looking, "now", False):
            _looking.now = True
            try:
                others = kept._trackable_children()
            finally:
                _looking.now = False
            if others:
                children = {**children, _OTHER_VARIABLES: kept}
        return children

    kind._trackable_children = _trackable_children


_other_variables: weakref.WeakKeyDictionary[Any, _OtherVariables] = weakref.WeakKeyDictionary()
_looking = threading.local()


# --- models on disk -----------------------------------------------------------


def lend(variable: Any, value: Any) -> None:
    """Gives a variable of another process memory on this host, until `take_back`.

    All who hold the variable can read it meanwhile, as `give_up` and `move_to` change it in
    place too.
    """
    given_up = variable._value if isinstance(variable, keras.Variable) else variable
    with tf.init_scope(), tf.device("CPU:0"), _outside_of_functions():
        memory = tf.Variable(value, dtype=given_up.dtype, shape=given_up.shape)
    setattr(given_up, _LENT, (given_up._handle, given_up._handle_name, type(given_up)))
    given_up._handle, given_up._handle_name = memory._handle, memory._handle_name
    given_up.__class__ = type(given_up).__mro__[1]  # the readable one


def take_back(variable: Any) -> None:
    """Ends what `lend` began."""
    given_up = variable._value if isinstance(variable, keras.Variable) else variable
    given_up._handle, given_up._handle_name, given_up.__class__ = getattr(given_up, _LENT)
    delattr(given_up, _LENT)


_LENT = "_smp_lent"


def assignments_elsewhere_ignored() -> Any:
    """Context in which assigning to a variable of another process does nothing.

    Keras assigns all weights of a model that it loads, wherever they are.
    """

    def make(original: Any) -> Any:
        def assign(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return self if is_elsewhere(self) else original(self, value, *args, **kwargs)

        return assign

    return replaced(resource_variable_ops.BaseResourceVariable, "assign", make)


def all_layers(model: Any) -> list[Any]:
    """A model and all layers in it, at any depth; the public `layers` are those of the top."""
    return list(model._flatten_layers())


def checkpoint_root(checkpoint: Any) -> tuple[Any, dict[str, Any]]:
    """The object that a `tf.train.Checkpoint` stores as number 0, and children besides its own.

    With `tf.train.Checkpoint(model)` it is the model, else the checkpoint itself.
    """
    view = checkpoint._saver._graph_view
    attached = {reference.name: reference.ref for reference in view.attached_dependencies or ()}
    return view.root, {name: child for name, child in attached.items() if name != "root"}


# --- training by Keras' trainer ----------------------------------------------


def record_call(
    results: Sequence[Tensor],
    variables: Sequence[Any],
    inputs: Sequence[Tensor],
    backward: Callable[..., Sequence[Any]],
) -> None:
    """Tells tapes how to differentiate results that they have not seen being computed.

    As `tf.custom_gradient`, but with the variables themselves as arguments: they need not be
    read, which a variable of another process cannot be.

    Args:
        results: Tensors that were made while no tape recorded.
        variables: `tf.Variable`s that they depend on.
        inputs: Tensors that they depend on.
        backward: Takes the gradient of each result, gives that of each variable and input.
    """
    for variable in variables:
        tape.variable_accessed(variable)
    arguments = [*(variable.handle for variable in variables), *inputs]
    record.record_operation("OpensmpCall", list(results), arguments, backward)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Lets tapes record inside of `stop_recording`, as the code of a function traced there may."""
    stopped = pywrap_tfe.TFE_Py_TapeSetIsStopped()
    if stopped:
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        if stopped:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()


def compiled_loss(model: Any) -> Any:
    """What computes the loss of all outputs; None without a loss. `model.loss` is as given."""
    return model._compile_loss


def compiled_metrics(model: Any) -> Any:
    """What updates all metrics that `compile` was given; None without any."""
    return model._compile_metrics


def build_metrics(model: Any, y: Any, outputs: Any) -> None:
    """Makes the metrics that `compile` was given; Keras does it at their first update."""
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        metrics.build(y, outputs)


def call_in_training(model: Any, x: Any) -> Any:
    """Calls a model as Keras' `train_step` does."""
    return model(x, training=True) if model._call_has_training_arg else model(x)


def track_loss(model: Any, loss: Tensor, rows: Any) -> None:
    """Notes the loss of a batch for the logs, as Keras' `train_step` does."""
    model._loss_tracker.update_state(loss, sample_weight=rows)


_counts_rows = threading.local()


@contextlib.contextmanager
def rows_count(known: bool) -> Iterator[None]:
    """Context that says whether plain Keras would know the number of rows of a batch.

    Keras weights the logged loss of each of several outputs by the rows of the batch, but only
    where it knows them when it traces: not with a dataset whose last batch may be smaller.
    """
    outer = getattr(_counts_rows, "known", True)
    _counts_rows.known = known

    def make(original: Any) -> Any:
        def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if known:
                return original(self, y_true, y_pred, sample_weight)
            return original(
                self, y_true, tf.nest.map_structure(_of_unknown_rows, y_pred), sample_weight
            )

        return call

    try:
        with replaced(compile_utils.CompileLoss, "call", make):
            yield
    finally:
        _counts_rows.known = outer


def _of_unknown_rows(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, tf.Tensor) or not tensor.shape.rank:
        return tensor
    shape = [None, *tensor.shape[1:]]
    result = tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=shape)
    for get, put in ((get_mask, set_mask), (get_logits, set_logits)):
        value = get(tensor)
        if value is not None:
            put(result, value)
    return result


def track(metric: Any, value: Tensor, rows: int) -> None:
    """Notes the loss of one of several outputs as Keras does; see `rows_count`."""
    known = getattr(_counts_rows, "known", True)
    metric.update_state(value, sample_weight=rows if known else None)


@contextlib.contextmanager
def tracked_values(metrics: Sequence[Any]) -> Iterator[dict[int, Tensor]]:
    """Context in which metrics give away what they are told, by id, in place of noting it.

    The losses of several outputs are noted for each batch, and not for each microbatch.
    """
    values: dict[int, Tensor] = {}

    def taking(metric: Any) -> Callable[..., None]:
        def update_state(value: Tensor, sample_weight: Any = None) -> None:
            values[id(metric)] = value

        return update_state

    for metric in metrics:
        vars(metric)["update_state"] = taking(metric)
    try:
        yield values
    finally:
        for metric in metrics:
            del vars(metric)["update_state"]


def silence_deprecations() -> Any:
    """Context in which TensorFlow does not tell that one of its functions is deprecated."""
    return deprecation.silence()


# --- callbacks -----------------------------------------------------------------


def global_seed() -> int | None:
    """The seed of `tf.random.set_seed`; the public `get_seed` counts as a use of it."""
    seed: int | None = context.global_seed()
    return seed


@contextlib.contextmanager
def arrays_shuffled_by(shuffle: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which what Keras makes of arrays is shuffled by a function of the indices.

    Keras uses `tf.random.shuffle`, whose order is another one in each process without a seed,
    and the same in each epoch with one.
    """
    original = tf.random.shuffle

    def replacement(value: Any, seed: Any = None, name: Any = None) -> Any:
        return shuffle(value) if seed is None else original(value, seed, name)

    tf.random.shuffle = replacement
    try:
        yield
    finally:
        tf.random.shuffle = original


def overrides(callback: Any, hook: str) -> bool:
    """Whether a callback does anything at a hook such as `"on_epoch_end"`."""
    return not getattr(getattr(callback, hook), "_is_default", False)


def initial_epoch(model: Any) -> int | None:
    """The epoch that `fit` begins with if it is not its argument; BackupAndRestore sets it."""
    epoch: int | None = model._initial_epoch
    return epoch


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """See `initial_epoch`."""
    model._initial_epoch = epoch


@contextlib.contextmanager
def averages_of_own(optimizer: Any) -> Iterator[None]:
    """Context in which an optimizer has those weights and moving averages that lie here.

    Keras' SwapEMAWeights goes through both lists, and reads each of them.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    names = ("_trainable_variables", "_model_variables_moving_average")
    kept: list[tuple[Any, str, Any]] = []
    for each in getattr(inner, "optimizers", [inner]):
        lists = [vars(each).get(name) for name in names]
        if None in lists:
            continue
        here = [not is_elsewhere(variable) for variable in lists[0]]
        for name, variables in zip(names, lists, strict=True):
            kept.append((each, name, variables))
            vars(each)[name] = list(itertools.compress(variables, here))
    try:
        yield
    finally:
        for each, name, variables in kept:
            vars(each)[name] = variables


# --- models from disk ---------------------------------------------------------


class _Layout(saving_lib.H5IOStore):
    """A store of weights that notes what is put into it and keeps nothing."""

    def __init__(self) -> None:  # no file is opened
        self.found: dict[str, Any] = {}
        self._at = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> Any:
        """The place of a layer's own weights."""
        self._at = path
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        name = f"{self._at}/vars/{key}".removeprefix("/")
        shape = tuple(value.shape) if hasattr(value, "shape") else ()
        self.found[name] = (getattr(value, "path", name), shape)


def weights_layout(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What Keras would write of a model into a `.weights.h5` file, without reading any weight.

    The optimizer is left out, for it reads its variables before it hands them over. Keras
    itself finds out while it loads, when half of the weights are overwritten.

    Returns:
        Name of each dataset to the path and shape of the variable.
    """
    layout = _Layout()
    done = {id(getattr(model, "optimizer", None))}
    saving_lib._save_state(
        model, weights_store=layout, assets_store=None, inner_path="", visited_saveables=done
    )
    return layout.found


@contextlib.contextmanager
def compilation_kept(model: Any) -> Iterator[None]:
    """Context in which Keras may write a `.h5` file of a model.

    Keras takes the optimizer out of the model's own configuration when it does, so that all
    files that are written afterwards lack it.
    """
    owner: Any = getattr(model, "_compile_config", None)
    kept = None if owner is None else dict(owner.config)
    try:
        yield
    finally:
        if kept is not None:
            owner.config.update(kept)


def in_safe_mode() -> bool:
    """Whether Keras must not make objects now that may run code of whoever wrote the file."""
    return serialization_lib.in_safe_mode() is not False


def inlined(graph_def: Any, fetches: Sequence[str]) -> Any:
    """A graph in which the bodies of called functions stand in place of the calls.

    Args:
        graph_def: A `GraphDef` with its library.
        fetches: Names of the tensors that are wanted.
    """
    for function in graph_def.library.function:
        # Names another implementation of the function, which would keep it from being inlined.
        function.attr.pop("api_implements", None)
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    meta_graph = tf.compat.v1.train.export_meta_graph(graph_def=graph_def, graph=graph)
    meta_graph.collection_def["train_op"].node_list.value.extend(fetches)
    config = config_pb2.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.min_graph_nodes = -1  # also small graphs
    rewrites.optimizers.append("function")
    rewrites.function_optimization = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return tf_optimizer.OptimizeGraph(config, meta_graph)
