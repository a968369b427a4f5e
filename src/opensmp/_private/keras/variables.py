"""Variables: their memory, where it lies, and those of other processes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.ops import resource_variable_ops

from opensmp._private.patching import replaced
from opensmp._private.tensorflow.variable_placement import (
    ELSEWHERE,
    home_of,
    make_unreadable,
    readable_kind,
    redirected,
    set_home,
)

Tensor = Any


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


@contextlib.contextmanager
def own_pending_variables() -> Iterator[None]:
    """Context in which the variables that wait are those made in it, and no others.

    What a call that failed has left waiting belongs to another model. It waits on
    afterwards, except for what got its memory meanwhile.
    """
    earlier = take_pending_variables()
    try:
        yield
    finally:
        made = take_pending_variables()
        waiting = [variable for variable in [*earlier, *made] if not is_initialized(variable)]
        global_state.set_global_attribute("uninitialized_variables", waiting)


def outside_of_functions() -> Any:
    """Context in which a new variable is none of the `tf.function` being traced.

    Such a function would otherwise trace the user's code a second time, to see that
    it makes no variables then.
    """

    def creator(next_creator: Any, **kwargs: Any) -> Any:
        return next_creator(**{**kwargs, "experimental_enable_variable_lifting": False})

    return tf.variable_creator_scope(creator)


def initialize_on(variable: Any, device: str) -> None:
    """Gives a waiting Keras variable its memory and first value on `device`."""
    with tf.init_scope(), tf.device(device), outside_of_functions():
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
    with tf.init_scope(), tf.device(device), outside_of_functions():
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
    """Whether a variable, Keras' or the `tf.Variable` behind one, was given up."""
    return hasattr(getattr(variable, "_value", variable), ELSEWHERE)


def set_copy(variable: Any, is_copy: bool) -> None:
    """Says whether a Keras variable that can be read here is a copy of another process's.

    That process alone changes it in training, such as the state of a seed generator that no
    layer has. It keeps its memory here, for the program may read it beside the model, but what is
    saved is the other one.
    """
    if is_elsewhere(variable) or is_copy == hasattr(variable._value, _COPY):
        return
    if is_copy:
        setattr(variable._value, _COPY, True)
    else:
        delattr(variable._value, _COPY)


def is_kept_here(variable: Any) -> bool:
    """Whether the value that counts is in this process: not given up, and not a copy."""
    return not is_elsewhere(variable) and not hasattr(getattr(variable, "_value", variable), _COPY)


_COPY = "_smp_copy"


def _slots(variable: Any) -> list[Any]:
    """The variables that optimizers have made for a Keras variable."""
    slots = (reference() for reference in getattr(variable._value, SLOTS, ()))
    return [slot for slot in slots if slot is not None]


SLOTS = "_smp_slots"


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
    if is_elsewhere(reference_variable):
        give_up(slot, getattr(value, ELSEWHERE))


def lend(variable: Any, value: Any) -> None:
    """Gives a variable of another process its value on this host, until `take_back`.

    All who hold the variable can read it meanwhile, as `give_up` and `move_to` change it in
    place too.
    """
    given_up = variable._value if isinstance(variable, keras.Variable) else variable
    with tf.init_scope(), tf.device("CPU:0"), outside_of_functions():
        memory = tf.Variable(value, dtype=given_up.dtype, shape=given_up.shape)
    setattr(given_up, _LENT, (given_up._handle, given_up._handle_name, type(given_up)))
    given_up._handle, given_up._handle_name = memory._handle, memory._handle_name
    if is_elsewhere(given_up):
        given_up.__class__ = readable_kind(given_up)


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
