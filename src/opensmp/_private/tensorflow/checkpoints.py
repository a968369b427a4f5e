"""Contents of a `tf.train.Checkpoint`, and restoring it in parts."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from keras.src.optimizers import base_optimizer
from tensorflow.core.protobuf import trackable_object_graph_pb2
from tensorflow.python.checkpoint import checkpoint as tf_checkpoint
from tensorflow.python.trackable import base as tf_trackable
from tensorflow.python.training.saving import saveable_object_util

from opensmp._private.keras.variables import is_elsewhere
from opensmp._private.patching import replaced
from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Tensor
from opensmp.errors import CheckpointError


class CheckpointValue(NamedTuple):
    """A value stored by a `tf.train.Checkpoint`.

    Attributes:
        key: Its key in the files, such as `"model/dense/_kernel/.ATTRIBUTES/VARIABLE_VALUE"`.
        slice_spec: Its slice of a larger tensor; "" for a whole tensor.
        owner: The object it belongs to, such as a variable or an iterator.
        read: Returns its current tensor; None if the owner has no value yet.
    """

    key: str
    slice_spec: str
    owner: Any
    read: Callable[[], Tensor | None]


class CheckpointNode(NamedTuple):
    """An object of a checkpoint."""

    children: dict[str, int]
    keys: dict[str, str]


OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


def checkpoint_values(checkpoint: Any) -> tuple[list[CheckpointValue], bytes]:
    """The values and the serialized object graph that `checkpoint.write` would write.

    The public `write` reads all variables at once and writes them to one place.
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
            owner = owner.obj  # such as an iterator
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
    """The objects of a checkpoint by node number; node 0 is the root."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(object_graph)
    return [
        CheckpointNode(
            {child.local_name: child.node_id for child in node.children},
            {value.name: value.checkpoint_key for value in node.attributes},
        )
        for node in graph.nodes
    ]


def restore_where_values_are() -> None:
    """Makes `tf.train.Checkpoint.restore` skip variables that other processes own. Idempotent.

    It would otherwise read the values of all variables, and allocate memory for those of other
    processes. Values that were read before are taken from `values_at_hand`.
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
            # Frees each value once it is assigned, so that none is held twice.
            values = [_at_hand.pop(name) for name in names]
            saveable.restore(values, None)
        return restore(self, rest, *args, **kwargs)

    owner.restore_saveables = restore_saveables
    owner._smp_restores = True


_at_hand: dict[str, Tensor | None] = {}


_LATE = "_smp_late"


def before_late_restores(status: Any, check: Callable[[list[str], Any], None]) -> None:
    """Sets a function that is called before values are assigned to objects made after a restore."""
    setattr(status._checkpoint, _LATE, check)


def keep_with_restore(status: Any, thing: Any) -> None:
    """Keeps an object alive as long as a restore may still assign deferred values."""
    status._checkpoint._smp_kept = thing


@contextlib.contextmanager
def values_at_hand(values: dict[str, Tensor | None]) -> Iterator[None]:
    """Context in which restoring a checkpoint takes values, by key, from here instead of files.

    None leaves the object unchanged. The dict is emptied.
    """
    _at_hand.update(values)
    values.clear()
    try:
        yield
    finally:
        _at_hand.clear()


def iterator_state(iterator: Any) -> Tensor:
    """Position of a dataset iterator, as a checkpoint stores it."""
    return iterator._serialize_to_tensors()["_STATE"]


def set_iterator_state(iterator: Any, state: Tensor) -> None:
    """Sets the position of a dataset iterator."""
    iterator._restore_from_tensors({"_STATE": state})


class HeldBackRestores:
    """Delays restoring checkpoint values to variables created while a model is traced.

    TensorFlow assigns such a value when the variable is attached to its layer, at which time the
    variable has neither memory nor device.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Context in which deferred restores are collected instead of executed."""

        def make(original: Any) -> Any:
            def _handle_deferred_dependencies(owner: Any, name: str, trackable: Any) -> None:
                self._waiting.append((owner, name, trackable))

            return _handle_deferred_dependencies

        with replaced(tf_trackable.Trackable, "_handle_deferred_dependencies", make):
            yield

    def release(self, model: Any) -> None:
        """Executes the collected restores."""
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
    """Variables of a Keras model that TensorFlow cannot reach through its attributes.

    The name of each is its index in `model.variables`.
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
    """Ids of all objects that TensorFlow reaches from a model, without its optimizer."""
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
    """Adds all variables of a class of models to their checkpoints. Idempotent.

    TensorFlow follows attributes. Keras stores the layers of Functional and Sequential models,
    layers in lists, and the seeds of dropout elsewhere, so that plain checkpoints of such models
    contain only the variables that the optimizer refers to.
    """
    if "_trackable_children" in vars(kind):
        return

    def _trackable_children(self: Any, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        children = super(kind, self)._trackable_children(save_type, **kwargs)
        if save_type != "checkpoint":
            return children
        kept = _other_variables.setdefault(self, _OtherVariables(self))
        # Avoids recursion: the search for other variables calls this method as well.
        if not _looking.get():
            with _looking.set_to(True):
                others = kept._trackable_children()
            if others:
                children = {**children, _OTHER_VARIABLES: kept}
        return children

    kind._trackable_children = _trackable_children


_other_variables: weakref.WeakKeyDictionary[Any, _OtherVariables] = weakref.WeakKeyDictionary()


_looking = ThreadValue(False)


def checkpoint_root(checkpoint: Any) -> tuple[Any, dict[str, Any]]:
    """The root object (node 0) of a `tf.train.Checkpoint`, and its additional children.

    With `tf.train.Checkpoint(model)` the root is the model, else the checkpoint itself.
    """
    view = checkpoint._saver._graph_view
    attached = {reference.name: reference.ref for reference in view.attached_dependencies or ()}
    return view.root, {name: child for name, child in attached.items() if name != "root"}
