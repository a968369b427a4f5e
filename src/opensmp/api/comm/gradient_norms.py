"""Dispatches TensorFlow's global-norm functions to versions that handle distributed gradients.

`tf.linalg.global_norm` and `tf.clip_by_global_norm` would count the gradients that other processes
own as zeros. The module registers overrides through TensorFlow's API dispatch on import. Dispatch
matches lists that contain `tf.IndexedSlices`; other lists are not inspected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Union

import tensorflow as tf

from opensmp.api.comm.collectives import clip_by_global_norm, norm_of
from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.lowering.sparse_gradients import with_values
from opensmp.distributed.world import current, is_initialized
from opensmp.execution.multi_process.remote_gradient import RemoteGradient, is_elsewhere

# TensorFlow's dispatch does not support `X | Y`.
_Gradients = list[Union[tf.Tensor, tf.IndexedSlices, None]]  # noqa: UP007


@tf.experimental.dispatch_for_api(tf.linalg.global_norm, {"t_list": _Gradients})
def _global_norm(t_list: Sequence[Gradient | None], name: str | None = None) -> Tensor:
    if not _are_spread(t_list):
        return tf.linalg.global_norm(list(map(_values, t_list)), name)
    if _is_known_elsewhere_only(t_list):
        return _unknown(t_list)
    return norm_of("tf.linalg.global_norm", t_list)


@tf.experimental.dispatch_for_api(tf.clip_by_global_norm, {"t_list": _Gradients})
def _clip_by_global_norm(
    t_list: Sequence[Gradient | None],
    clip_norm: Any,
    use_norm: Any | None = None,
    name: str | None = None,
) -> tuple[list[Gradient | None], Tensor]:
    if _are_spread(t_list):
        if use_norm is None and _is_known_elsewhere_only(t_list):
            return list(t_list), _unknown(t_list)
        return clip_by_global_norm(t_list, clip_norm, use_norm)
    values = list(map(_values, t_list))
    clipped, norm = tf.clip_by_global_norm(values, clip_norm, use_norm, name)
    return list(map(_with_values, t_list, clipped)), norm


# ---------------------------------------------------------------------------------- helpers


def _are_spread(gradients: Sequence[Gradient | None]) -> bool:
    """Whether other processes own some of the gradients.

    Empty slices alone do not imply that: they may also have no rows in a single process.
    """
    if not is_initialized() or len(current().mp_group) == 1:
        return False
    return any(map(is_elsewhere, gradients))


def _is_known_elsewhere_only(gradients: Sequence[Gradient | None]) -> bool:
    """Whether one other process owns all gradients, and so will not ask this process for any.

    Gradients without a shape, such as that of a scale, are ignored: all processes have them.
    """
    sized = [g for g in gradients if g is not None and g.shape.rank != 0]
    processes = {g.process if isinstance(g, RemoteGradient) else None for g in sized}
    return len(processes) == 1 and None not in processes


def _unknown(gradients: Sequence[Gradient | None]) -> Tensor:
    """NaN as the norm of gradients of which this process owns none, with a warning."""
    rank = next(g.process for g in gradients if isinstance(g, RemoteGradient))
    warnings.warn(
        f"The norm of gradients is NaN on this rank: rank {rank} of the replica (smp.pp_rank) has "
        "all of them, and clips them. smp.clip_by_global_norm gives the norm to all ranks.",
        stacklevel=4,
    )
    return tf.constant(math.nan, next(g.dtype for g in gradients if g is not None))


def _values(gradient: Gradient | None) -> Tensor | None:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Gradient | None, values: Tensor | None) -> Gradient | None:
    if isinstance(gradient, tf.IndexedSlices):
        return with_values(gradient, values)
    return values
