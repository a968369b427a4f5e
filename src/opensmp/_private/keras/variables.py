"""Keras variables: their memory, device and slots, and variables that other processes own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.ops import resource_variable_ops

from opensmp._private.keras.kept_slots import keep_now, slot_device
from opensmp._private.keras.shards import is_left_to_another, mark_slot, set_shard, updater_of
from opensmp._private.patching import replaced
from opensmp._private.tensorflow.variable_placement import (
    ELSEWHERE,
    home_of,
    make_unreadable,
    readable_kind,
    redirected,
    set_home,
)
from opensmp.base.types import Tensor


def is_initialized(variable: Any) -> bool:
    """Whether a Keras variable has memory."""
    return variable._value is not None


def variable_dtype(variable: Any) -> Any:
    """The stored dtype; the public one follows the autocast scope."""
    return tf.as_dtype(variable._dtype)


def take_pending_variables() -> list[Any]:
    """Empties and returns Keras' list of variables that are not initialized yet.

    If the list stayed in place, any unrelated layer call would initialize them all on the default
    device.
    """
    pending = global_state.get_global_attribute("uninitialized_variables") or []
    taken = list(pending)
    pending.clear()
    return taken


@contextlib.contextmanager
def own_pending_variables() -> Iterator[None]:
    """Context whose list of uninitialized variables holds only those created inside it.

    Variables that an earlier failed call left pending belong to another model. They are pending
    again afterwards, except those initialized meanwhile.
    """
    earlier = take_pending_variables()
    try:
        yield
    finally:
        made = take_pending_variables()
        waiting = [variable for variable in [*earlier, *made] if not is_initialized(variable)]
        global_state.set_global_attribute("uninitialized_variables", waiting)


def outside_of_functions() -> Any:
    """Context in which new variables do not count as created by the `tf.function` being traced.

    A function that creates variables would trace the user's code a second time, to check that it
    creates none then.
    """

    def creator(next_creator: Any, **kwargs: Any) -> Any:
        return next_creator(**{**kwargs, "experimental_enable_variable_lifting": False})

    return tf.variable_creator_scope(creator)


def initialize_on(variable: Any, device: str) -> None:
    """Allocates and initializes a pending Keras variable on `device`."""
    with tf.init_scope(), tf.device(device), outside_of_functions():
        variable._deferred_initialize()


def storage(variable: Any) -> Any:
    """The `tf.Variable` behind a Keras variable, not affected by autocast scopes."""
    return variable._value


def move_to(variable: Any, device: str) -> None:
    """Moves an initialized Keras variable, its value and its optimizer slots to `device`.

    The `tf.Variable` stays the same object and only its memory changes, because optimizers and
    checkpoints refer to the object. Functions traced before keep the old memory.
    """
    for slot in _slots(variable):
        if not is_elsewhere(slot):
            move_to(slot, slot_device(device))
            keep_now([slot])
    give_memory(variable._value, variable._value.read_value, device, variable.name)


def give_memory(
    stored: Any, value: Callable[[], Any], device: str, name: str | None = None
) -> None:
    """Gives a `tf.Variable` new memory with the result of `value`, which is called on `device`."""
    with tf.init_scope(), tf.device(device), outside_of_functions():
        memory = tf.Variable(
            value(),
            trainable=stored.trainable,
            name=name,
            dtype=stored.dtype,
            aggregation=stored.aggregation,
            synchronization=stored.synchronization,
            shape=stored.shape,
        )
    stored._handle, stored._handle_name = memory._handle, memory._handle_name


def give_up(variable: Any, name: str) -> None:
    """Releases the memory of a Keras variable, and of its slots, that another process owns.

    The variable stays in models, optimizers and graphs; reading it here raises an error that shows
    `name`.
    """
    for slot in _slots(variable):
        give_up(slot, name)
    if variable._value is None:
        with tf.init_scope(), tf.device("CPU:0"), outside_of_functions():
            variable._value = resource_variable_ops.UninitializedVariable(
                trainable=variable.trainable,
                name=name,
                shape=variable._shape,
                dtype=variable_dtype(variable),
            )
        variable._initializer = None
    make_unreadable(variable._value, name)


def is_elsewhere(variable: Any) -> bool:
    """Whether a Keras variable, or the `tf.Variable` behind one, was given up."""
    return hasattr(getattr(variable, "_value", variable), ELSEWHERE)


def set_copy(variable: Any, is_copy: bool) -> None:
    """Sets whether a Keras variable that is readable here is a copy of another process's variable.

    Only the owner changes it in training; an example is the state of a seed generator outside any
    layer. The copy keeps its memory, because the user's program may read it outside the model, but
    the owner's value is the one that is saved.
    """
    if is_elsewhere(variable) or is_copy == hasattr(variable._value, _COPY):
        return
    if is_copy:
        setattr(variable._value, _COPY, True)
    else:
        delattr(variable._value, _COPY)


def is_kept_here(variable: Any) -> bool:
    """Whether this process owns the value: neither given up nor a copy."""
    return not is_elsewhere(variable) and not hasattr(getattr(variable, "_value", variable), _COPY)


_COPY = "_smp_copy"


def slots_here(variable: Any) -> list[Any]:
    """Slots of a Keras variable, or of the `tf.Variable` behind one, with memory here."""
    return [slot for slot in _slots(variable) if not is_elsewhere(slot)]


def _slots(variable: Any) -> list[Any]:
    """Slots that optimizers created for a Keras variable, or the `tf.Variable` behind one."""
    stored = getattr(variable, "_value", variable)
    slots = (reference() for reference in getattr(stored, SLOTS, ()))
    return [slot for slot in slots if slot is not None]


SLOTS = "_smp_slots"


@contextlib.contextmanager
def variable_access(
    read: Callable[[Any], Tensor | None], write: Callable[[Any, Tensor], bool]
) -> Iterator[None]:
    """Context in which reads and assignments of `tf.Variable`s are redirected.

    `read(variable)` returns the value to use, or None for a normal read; `write(variable, value)`
    returns whether it handled the assignment. Keras' StatelessScope does this for Keras variables
    only.
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
        stack.enter_context(redirected())
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


def know_slot(reference_variable: Any, slot: Any) -> None:
    value = getattr(reference_variable, "_value", reference_variable)
    if not hasattr(value, SLOTS):
        setattr(value, SLOTS, [])
    if any(known() is slot for known in getattr(value, SLOTS)):
        return
    getattr(value, SLOTS).append(weakref.ref(slot))
    home = home_of(reference_variable)
    if home is not None:
        number = (*home.number, len(getattr(value, SLOTS)))
        set_home(slot, home._replace(number=number, name=f"{slot.path}, slot of {home.name}"))
    mark_slot(slot)
    if is_elsewhere(reference_variable):
        give_up(slot, getattr(value, ELSEWHERE))
    shed_slot(reference_variable, slot)
    if not is_elsewhere(slot):
        keep_now([slot])


def shed_slots(variable: Any) -> None:
    """Gives up the slots of a variable that another replica updates."""
    for slot in _slots(variable):
        shed_slot(variable, slot)


def shed_slot(variable: Any, slot: Any) -> None:
    """Marks a slot of a variable that one replica updates, and gives it up in the others."""
    updater = updater_of(variable)
    if updater is None:
        return
    set_shard(slot, True)
    if is_left_to_another(variable) and not is_elsewhere(slot):
        give_up(slot, f"{slot.path} of replica {updater} (shard_optimizer_state)")


def lend(variable: Any, value: Any) -> None:
    """Gives a variable of another process a value in host memory, until `take_back`.

    The variable is changed in place, so that all references to it can read it meanwhile.
    """
    given_up = variable._value if isinstance(variable, keras.Variable) else variable
    kept = given_up._handle, given_up._handle_name, type(given_up)
    give_memory(given_up, lambda: value, "CPU:0")
    setattr(given_up, _LENT, kept)
    if is_elsewhere(given_up):
        given_up.__class__ = readable_kind(given_up)


def take_back(variable: Any) -> None:
    """Undoes `lend`."""
    given_up = variable._value if isinstance(variable, keras.Variable) else variable
    given_up._handle, given_up._handle_name, given_up.__class__ = getattr(given_up, _LENT)
    delattr(given_up, _LENT)


_LENT = "_smp_lent"


def assignments_elsewhere_ignored() -> Any:
    """Context in which assignments to variables of other processes do nothing.

    Keras assigns all weights of a model that it loads, whichever process owns them.
    """

    def make(original: Any) -> Any:
        def assign(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return self if is_elsewhere(self) else original(self, value, *args, **kwargs)

        return assign

    return replaced(resource_variable_ops.BaseResourceVariable, "assign", make)
