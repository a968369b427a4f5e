"""Optimizer patches: updates on the variables' devices, and agreement between processes."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import optimizer as keras_tf_optimizer
from keras.src.optimizers import base_optimizer
from tensorflow.python.distribute import distribute_lib

from opensmp._private.keras.averages import average_what_is_here, overwrite_what_is_here
from opensmp._private.keras.kept_slots import slot_device, updating
from opensmp._private.keras.sharded_optimizers import share_updates
from opensmp._private.keras.shards import is_left_to_another, is_slot, shards_now
from opensmp._private.keras.variables import (
    is_elsewhere,
    know_slot,
    outside_of_functions,
    slots_here,
)
from opensmp._private.tensorflow.function_graphs import graphs_around
from opensmp._private.tensorflow.variable_placement import not_followed, note_assigned
from opensmp.base import versions
from opensmp.base.types import Tensor


def place_updates_with_variables() -> None:
    """Patches Keras optimizers for variables on several devices and in several processes.

    Keras asks the default strategy to place slots and update arithmetic with their variable, which
    it does not do: both land on the first device. Idempotent.
    """
    extended = distribute_lib._DefaultDistributionExtended
    if getattr(extended, "_smp_placed", False):
        return
    update, colocate = extended._update, extended.colocate_vars_with

    def _update(self: Any, var: Any, fn: Any, args: Any, kwargs: Any, group: Any) -> Any:
        with tf.device(var.device):
            slots = [*slots_here(var), *([var] if is_slot(var) else [])]  # one of gradients
            return updating(slots, lambda: update(self, var, fn, args, kwargs, group))

    def colocate_vars_with(self: Any, colocate_with_variable: Any) -> Any:
        device = getattr(colocate_with_variable, "device", None)
        return tf.device(slot_device(device)) if device else colocate(self, colocate_with_variable)

    extended._update, extended.colocate_vars_with = _update, colocate_vars_with
    extended._smp_placed = True
    _place_averages_and_clipping()
    _know_slots()
    _know_factors()
    average_what_is_here()
    _leave_out_what_is_elsewhere()
    _update_on_their_own()
    _scale_by_a_variable()
    _check_finite_together()
    _reduce_only_over_replicas()
    share_updates()


def _know_slots() -> None:
    """Registers the slots that optimizers create for a variable, for `move_to` and `give_up`."""
    owner = base_optimizer.BaseOptimizer
    add = owner.add_variable_from_reference

    def add_variable_from_reference(
        self: Any, reference_variable: Any, *args: Any, **kwargs: Any
    ) -> Any:
        slot = add(self, reference_variable, *args, **kwargs)
        know_slot(reference_variable, slot)
        return slot

    owner.add_variable_from_reference = add_variable_from_reference
    reset = owner._backend_reset_gradient_accumulators

    def _backend_reset_gradient_accumulators(self: Any) -> None:
        sums = [each for each in self._accumulated_gradients if each is not None]
        updating([each for each in sums if not is_elsewhere(each)], lambda: reset(self))

    owner._backend_reset_gradient_accumulators = _backend_reset_gradient_accumulators


def _know_factors() -> None:
    """Registers Adafactor's factors as slots: Keras creates them without a reference variable."""
    owner = keras.optimizers.Adafactor
    build, add = owner.build, owner.add_variable
    current = threading.local()

    class Followed(list[Any]):
        """The variables; records the one that Keras currently iterates over."""

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
        # Keras creates the slots with a reference before it sets `built`.
        if variable is None or not self.built:
            return add(self, *args, **kwargs)
        stored = getattr(variable, "_value", variable)
        device = getattr(stored, "device", None)
        with tf.device(slot_device(device) if device else None):
            slot = add(self, *args, **kwargs)
        know_slot(variable, slot)
        return slot

    owner.build, owner.add_variable = build_followed, add_variable


def _scale_by_a_variable() -> None:
    """Makes LossScaleOptimizer scale by a variable even in graphs traced before it is built.

    Keras uses the initial scale as a constant until then, which a function traced only once would
    keep, while gradients are divided by the current scale.
    """
    owner = keras.optimizers.LossScaleOptimizer
    build, scale_loss = owner.build, owner.scale_loss
    early: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def scale_loss_early(self: Any, loss: Any) -> Any:
        _note_scaling()
        if self.built or tf.executing_eagerly():
            return scale_loss(self, loss)
        if self not in early:
            with tf.init_scope(), tf.device("CPU:0"), outside_of_functions():
                early[self] = tf.Variable(self.initial_scale, dtype="float32", trainable=False)
        return keras.ops.multiply(loss, tf.convert_to_tensor(early[self]))

    def build_late(self: Any, var_list: Any) -> None:
        build(self, var_list)
        known = early.pop(self, None)
        # The scale variable takes over the memory that traced functions read, as in `move_to`.
        if known is not None:
            scale = self.dynamic_scale._value
            scale._handle, scale._handle_name = known._handle, known._handle_name
            scale._smp_known = known  # keeps the memory alive for those functions

    owner.build, owner.scale_loss = build_late, scale_loss_early


_SCALES_LOSS = "_smp_scales_loss"


def _note_scaling() -> None:
    for graph in graphs_around():
        setattr(graph, _SCALES_LOSS, True)


def scales_loss() -> bool:
    """Whether a LossScaleOptimizer has scaled a loss in the function being traced."""
    return any(getattr(graph, _SCALES_LOSS, False) for graph in graphs_around())


_agree_on_finite: Any = None


def agree_on_finite_with(agree: Callable[[Tensor], Tensor] | None) -> None:
    """Sets the function by which processes agree whether all gradients are finite.

    LossScaleOptimizer sees only the gradients of this process, and skips the update if one is not
    finite: some processes would skip an update that others apply.

    Args:
        agree: Takes whether the gradients of this process are finite, a Boolean scalar, and returns
            the same for all processes. None if there is only one process.
    """
    global _agree_on_finite
    _agree_on_finite = agree


def _check_finite_together() -> None:
    owner = keras.optimizers.LossScaleOptimizer
    check = owner.check_finite

    def check_finite(self: Any, grads: Any) -> Any:
        if _check_gradients is not None:
            _check_gradients(grads, ())
        if _agree_on_finite is None:
            return check(self, grads)
        # A placeholder for a gradient of another process would become dense, and large, there.
        here = [g for g in grads if g is not None and not _is_of_others(g)]
        return _agree_on_finite(check(self, here) if here else tf.constant(True))

    owner.check_finite = check_finite


_before_updates: Callable[[Any], None] | None = None


def before_updates(look: Callable[[Any], None]) -> None:
    """Sets a function that is called with the optimizer before each update of variables.

    The optimizer has all its own variables by then. In a `tf.function` it is called at tracing.
    """
    global _before_updates
    _before_updates = look


_check_gradients: Callable[[Sequence[Any], Sequence[Any]], None] | None = None


def check_gradients_with(check: Callable[[Sequence[Any], Sequence[Any]], None]) -> None:
    """Sets a function that checks the gradients passed to an optimizer before their first use.

    It takes the gradients and their variables (none where Keras does not pass them), and raises.
    """
    global _check_gradients
    _check_gradients = check


_is_kept_elsewhere: Callable[[Any], bool] | None = None


def leave_to_others(is_kept_elsewhere: Callable[[Any], bool]) -> None:
    """Sets the predicate for gradients that only other processes hold and handle."""
    global _is_kept_elsewhere
    _is_kept_elsewhere = is_kept_elsewhere


def _is_of_others(gradient: Any) -> bool:
    if isinstance(gradient, tf.IndexedSlices) and gradient.values.shape[:1] == [0]:
        return True
    return _is_kept_elsewhere is not None and _is_kept_elsewhere(gradient)


def _leave_out_what_is_elsewhere() -> None:
    """Makes optimizers update only variables that have memory in this process."""
    owner = base_optimizer.BaseOptimizer
    keep = owner._filter_empty_gradients

    def _filter_empty_gradients(self: Any, grads: Any, vars: Any) -> Any:
        if _check_gradients is not None:
            _check_gradients(grads, vars)
        if _before_updates is not None:
            _before_updates(self)
        pairs = list(zip(grads, vars, strict=True))
        for _, variable in pairs:
            if is_elsewhere(variable):
                note_assigned(variable)
        here = [(gradient, variable) for gradient, variable in pairs if not is_elsewhere(variable)]
        _note_places(self, pairs)
        if pairs and not here:
            _update_nothing(self)
            return [], []
        return keep(self, [gradient for gradient, _ in here], [variable for _, variable in here])

    owner._filter_empty_gradients = _filter_empty_gradients
    for base in (owner, keras_tf_optimizer.TFOptimizer):
        overwrite_what_is_here(base)


def _update_on_their_own() -> None:
    """Marks the reads and updates inside `Optimizer.apply` as differing between processes.

    The reads of a user's class in an `apply` of its own are the same in all processes.
    """
    owner = base_optimizer.BaseOptimizer
    apply = owner.apply

    def apply_alone(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        with not_followed():
            return apply(self, grads, trainable_variables)

    owner.apply = apply_alone


def _reduce_only_over_replicas() -> None:
    """Makes optimizers all-reduce gradients only under a strategy with several replicas.

    Without a strategy Keras reduces by `tf.custom_gradient`, which TensorFlow registers for the
    life of the process: the whole graph of a training step would outlive the model.
    """
    owner = keras_tf_optimizer.TFOptimizer
    reduce = owner._all_reduce_sum_gradients

    def _all_reduce_sum_gradients(self: Any, grads_and_vars: Any) -> Any:
        context = tf.distribute.get_replica_context()
        if context is not None and not tf.distribute.has_strategy():
            return list(grads_and_vars)
        return reduce(self, grads_and_vars)

    owner._all_reduce_sum_gradients = _all_reduce_sum_gradients


def _place_averages_and_clipping() -> None:
    """Places moving averages and clipping with the variables; Keras bypasses the strategy here."""
    owner = base_optimizer.BaseOptimizer
    average, clip = owner._update_model_variables_moving_average, owner._clip_gradients

    def _update_model_variables_moving_average(self: Any, trainable_variables: Any) -> None:
        if not self.use_ema:
            return
        averages = self._model_variables_moving_average
        for variable, moving in zip(trainable_variables, averages, strict=True):
            if is_elsewhere(variable) or is_elsewhere(moving):
                continue
            one = types.SimpleNamespace(
                use_ema=True,
                ema_momentum=self.ema_momentum,
                iterations=self.iterations,
                _model_variables_moving_average=[moving],
            )
            with tf.device(variable._value.device):
                updating([moving], functools.partial(average, one, [variable]))

    def _clip_gradients(self: Any, grads: Any) -> Any:
        if _clips_together(self):
            return _clipper(self)(list(grads), *_places[self], self.global_clipnorm)
        if not self.clipnorm and not self.clipvalue:  # none, or by the global norm
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
    """Sets the function that implements `global_clipnorm` across processes; None: Keras does it.

    Keras knows only the gradients of this process. Processes without gradients call it as well.

    Args:
        clip: Takes the gradients, the index of each among those of all processes, the number of the
            latter, and the maximum norm; returns the clipped gradients.
    """
    global _clip_together
    _clip_together = clip


def _clips_together(optimizer: Any) -> bool:
    wanted = optimizer.global_clipnorm and optimizer.global_clipnorm > 0
    return bool(_clipper(optimizer) is not None and wanted and not optimizer.clipnorm)


def _clipper(optimizer: Any) -> Any:
    """The function that clips by the norm of gradients of several processes; None if of one."""
    shards = shards_now()
    if shards is not None and optimizer.gradient_accumulation_steps:
        return shards.clip  # each replica has the sums of its share only
    return _clip_together


def _note_places(optimizer: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Records the indices, among all gradients of the model, of those that this process clips."""
    all_of_them = [
        variable
        for gradient, variable in pairs
        if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
    ]
    is_sum = bool(optimizer.gradient_accumulation_steps)
    places = [
        i
        for i, variable in enumerate(all_of_them)
        if not is_elsewhere(variable) and not (is_sum and is_left_to_another(variable))
    ]
    _places[optimizer] = places, len(all_of_them)


def _update_nothing(optimizer: Any) -> None:
    """Does this process's part of an update for which it has no gradients.

    It joins the global norm, and updates optimizer state that belongs to no variable, such as the
    momentum product of Nadam. Keras skips both without gradients.
    """
    clips = _clips_together(optimizer) and _places[optimizer][1]

    def take_part() -> None:
        if clips:
            _clipper(optimizer)([], *_places[optimizer], optimizer.global_clipnorm)
        optimizer._backend_update_step([], [], optimizer.learning_rate)

    steps = optimizer.gradient_accumulation_steps
    if not steps:
        take_part()
    else:
        # The public `iterations` counts updates, the private one calls.
        is_update_step = (optimizer._iterations + 1) % steps == 0
        keras.ops.cond(is_update_step, take_part, lambda: None)
    if versions.release(keras.__version__) == (3, 9):
        optimizer._iterations.assign_add(1)  # later versions also count calls without gradients
