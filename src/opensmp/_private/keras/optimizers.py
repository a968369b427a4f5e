"""Optimizers: slots and updates lie where the variable does, and processes agree."""

from __future__ import annotations

import contextlib
import itertools
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

from opensmp._private.keras.variables import is_elsewhere, know_slot, outside_of_functions
from opensmp._private.tensorflow.variable_placement import not_followed, note_assigned
from opensmp.base import versions

Tensor = Any


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
    _update_on_their_own()
    _scale_by_a_variable()
    _check_finite_together()
    _reduce_only_over_replicas()


def _know_slots() -> None:
    """Lets variables know the slots that optimizers make for them; see `move_to`, `give_up`."""
    owner = base_optimizer.BaseOptimizer
    add = owner.add_variable_from_reference

    def add_variable_from_reference(
        self: Any, reference_variable: Any, *args: Any, **kwargs: Any
    ) -> Any:
        slot = add(self, reference_variable, *args, **kwargs)
        know_slot(reference_variable, slot)
        return slot

    owner.add_variable_from_reference = add_variable_from_reference


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
        know_slot(variable, slot)
        return slot

    owner.build, owner.add_variable = build_followed, add_variable


def _average_what_is_here() -> None:
    """Lets ScheduleFreeAdamW begin at the weights that this process has; it copies all.

    Keras has this optimizer since 3.14.
    """
    owner = getattr(keras.optimizers, "ScheduleFreeAdamW", None)
    if owner is None:
        return
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
        if known is not None:  # as in `move_to`: the same object has that memory now
            scale = self.dynamic_scale._value
            scale._handle, scale._handle_name = known._handle, known._handle_name
            scale._smp_known = known  # functions that read it must find it alive

    owner.build, owner.scale_loss = build_late, scale_loss_early


_SCALES_LOSS = "_smp_scales_loss"


def _note_scaling() -> None:
    for graph in _graphs_around():
        setattr(graph, _SCALES_LOSS, True)


def scales_loss() -> bool:
    """Whether a LossScaleOptimizer has scaled a loss in the function that is being traced."""
    return any(getattr(graph, _SCALES_LOSS, False) for graph in _graphs_around())


def _graphs_around() -> Iterator[Any]:
    """The function graph that is being traced, and those around it."""
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, tf.__internal__.FuncGraph):  # the last one, of eager execution, is none
        yield graph
        graph = graph.outer_graph


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
        if _check_gradients is not None:
            _check_gradients(grads, ())
        if _agree_on_finite is None:
            return check(self, grads)
        # What stands for a gradient of another process would become dense, and large, there.
        here = [g for g in grads if g is not None and not _is_of_others(g)]
        return _agree_on_finite(check(self, here) if here else tf.constant(True))

    owner.check_finite = check_finite


_before_updates: Callable[[Any], None] | None = None


def before_updates(look: Callable[[Any], None]) -> None:
    """Has a function called before an optimizer updates variables, when it has all of its own.

    It takes the optimizer. In a `tf.function` it is called while that is traced.
    """
    global _before_updates
    _before_updates = look


_check_gradients: Callable[[Sequence[Any], Sequence[Any]], None] | None = None


def check_gradients_with(check: Callable[[Sequence[Any], Sequence[Any]], None]) -> None:
    """Has a function called with the gradients that an optimizer is given, before any use.

    It takes the gradients and their variables, none where Keras does not tell them, and raises.
    """
    global _check_gradients
    _check_gradients = check


_is_kept_elsewhere: Callable[[Any], bool] | None = None


def leave_to_others(is_kept_elsewhere: Callable[[Any], bool]) -> None:
    """Lets a function tell which gradients other processes alone have, and look after."""
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
        _overwrite_what_is_here(base)


def _update_on_their_own() -> None:
    """Tells that each process reads and updates variables of its own in an optimizer.

    What a user's class reads in an `apply` of its own is the same in all processes.
    """
    owner = base_optimizer.BaseOptimizer
    apply = owner.apply

    def apply_alone(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        with not_followed():
            return apply(self, grads, trainable_variables)

    owner.apply = apply_alone


def _reduce_only_over_replicas() -> None:
    """Makes optimizers all-reduce gradients only under a strategy with several replicas.

    Without a strategy the sum is over one replica, and Keras asks for it by `tf.custom_gradient`,
    which TensorFlow registers for the life of the process: with it the whole graph of a training
    step would stay in memory after the model is gone.
    """
    owner = keras_tf_optimizer.TFOptimizer
    reduce = owner._all_reduce_sum_gradients

    def _all_reduce_sum_gradients(self: Any, grads_and_vars: Any) -> Any:
        context = tf.distribute.get_replica_context()
        if context is not None and not tf.distribute.has_strategy():
            return list(grads_and_vars)
        return reduce(self, grads_and_vars)

    owner._all_reduce_sum_gradients = _all_reduce_sum_gradients


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
    if versions.release(keras.__version__) == (3, 9):
        optimizer._iterations.assign_add(1)  # later ones count calls without gradients too


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
