"""Optimizer patches: each variable is updated by one replica, which sends it to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras.src.optimizers import base_optimizer

from opensmp._private.keras.shards import Shards, is_left_to_another, is_slot, shards_now
from opensmp._private.keras.variables import is_elsewhere
from opensmp.base.thread_values import ThreadValue
from opensmp.errors import ConfigError

_is_clipped = ThreadValue(False)
_is_updating = ThreadValue(False)


def share_updates() -> None:
    """Patches Keras optimizers, so that `shard_with` has an effect; call it once."""
    _divide_when_built()
    _update_shares()


def share_averages(variables: Sequence[Any]) -> None:
    """Copies variables that their updaters have overwritten outside of an update."""
    shards = shards_now()
    if shards is not None and not _is_updating.get():
        shards.share(variables)


def _divide_when_built() -> None:
    """Divides variables before their slots are made, so that no replica needs memory for all."""

    def divide_first(owner: Any) -> None:
        build = owner.build

        def build_divided(self: Any, variables: Any) -> Any:
            shards = shards_now()
            if shards is not None and not self.built:
                shards.divide(list(variables))
            return build(self, variables)

        owner.build = build_divided

    divide_first(base_optimizer.BaseOptimizer)
    # It builds the others one by one, each with its variables only.
    several = getattr(keras.optimizers, "MultiOptimizer", None)
    if several is not None:
        divide_first(several)


def _update_shares() -> None:
    owner = base_optimizer.BaseOptimizer
    apply, clip = owner._backend_apply_gradients, owner._clip_gradients

    def _backend_apply_gradients(self: Any, grads: Any, trainable_variables: Any) -> None:
        shards = shards_now()
        if shards is None:
            apply(self, grads, trainable_variables)
            return
        _check(self)
        shards.divide(self._trainable_variables)
        clips = _clips_by_one_norm(self) and not self.gradient_accumulation_steps
        if clips:  # by the norm of all gradients, which each replica has
            grads = self._clip_gradients(grads)
        own = [i for i, v in enumerate(trainable_variables) if not is_left_to_another(v)]
        with _is_clipped.set_to(clips), _is_updating.set_to(True):
            apply(self, [grads[i] for i in own], [trainable_variables[i] for i in own])
        _share(self, shards, trainable_variables)

    def _clip_gradients(self: Any, grads: Any) -> Any:
        return grads if _is_clipped.get() else clip(self, grads)

    owner._backend_apply_gradients = _backend_apply_gradients
    owner._clip_gradients = _clip_gradients


def _clips_by_one_norm(optimizer: Any) -> bool:
    return bool(not optimizer.clipnorm and (optimizer.global_clipnorm or 0) > 0)


def _share(optimizer: Any, shards: Shards, updated: Sequence[Any]) -> None:
    """Sends what this call has changed; nothing in a call that only accumulates gradients."""
    if optimizer.use_ema and optimizer.ema_overwrite_frequency:
        # Averages overwrite all variables, also in calls that only accumulate.
        shards.share([v for v in optimizer._trainable_variables if not is_elsewhere(v)])
        return
    steps = optimizer.gradient_accumulation_steps
    if not steps:
        shards.share(updated)
        return
    is_update_step = (optimizer._iterations + 1) % steps == 0
    keras.ops.cond(is_update_step, lambda: shards.share(updated), lambda: None)


def _check(optimizer: Any) -> None:
    """Raises `ConfigError` for an optimizer that may have state outside of its slots.

    It would be updated in some replicas and not in others, or differently.
    """
    if type(optimizer).__module__.partition(".")[0] == "keras":
        return
    known = {id(optimizer._iterations), id(optimizer._learning_rate)}
    others = [v for v in optimizer._variables if id(v) not in known and not is_slot(v)]
    if others:
        paths = ", ".join(variable.path for variable in others[:5])
        raise ConfigError(
            f"shard_optimizer_state: the optimizer {type(optimizer).__name__} has variables that "
            f"belong to no trained variable: {paths}. Each replica updates other variables, so "
            "that the replicas might disagree about them. Expected: variables made with "
            "`self.add_variable_from_reference(variable, name)` only. Otherwise leave the key "
            "out: `shard_optimizer_state=False`."
        )
