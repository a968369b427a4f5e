"""Submodels that a step calls on their own; each is partitioned as a separate model.

The `train_step` of a GAN or an autoencoder calls the models it holds and never itself. While such a
step is traced, each layer of the model that is called directly is converted to a part. The object
stays the same and its `__class__` property still reports the original class; only its call behavior
changes. Inside a partitioned model a part acts as a plain layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.api.model.model import DistributedModel
from opensmp.base.types import Layer
from opensmp.distributed import world
from opensmp.distributed.collectives.variable_moves import copy_variables
from opensmp.execution.context import current_runner
from opensmp.execution.models import layer_calls, registry
from opensmp.execution.models.nested_models import PART
from opensmp.execution.partitioning import Partitioning
from opensmp.training.batch.batch_call import BatchCallResult, call_with_batch
from opensmp.training.batch.batch_split import NotByRows
from opensmp.training.call_mode import current_mode

_logger = logging.getLogger("opensmp")
_IN_ONE_PIECE = "_smp_in_one_piece"
_KNOWN = "_smp_known_stranger"


class _Part:
    """Base class of the two classes of parts."""

    _smp_is_part = True


class _PartModel(_Part, DistributedModel):
    """A model that a step has called on its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs plainly outside of steps if this process owns all variables, else partitioned."""
        if _is_alone():
            return super(DistributedModel, self).__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _smp_call_whole(self, here: world.World, args: Any, kwargs: Any) -> BatchCallResult:
        if _IN_ONE_PIECE not in self.__dict__:
            try:
                return super()._smp_call_whole(here, args, kwargs)
            except NotByRows as error:
                _logger.info(
                    "model '%s' is called with all rows of a batch at once, without microbatches, "
                    "for it does not give a result for each of them: %s",
                    self.name,
                    error,
                )
            self.__dict__[_IN_ONE_PIECE] = True
        return call_with_batch(self, here, args, kwargs, in_one_piece=True)


class _PartLayer(_Part):
    """A layer, not a model, that a step has called on its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Like `_PartModel.__call__`, through the `LayerModel` of this layer."""
        part: LayerModel = self.__dict__[PART]
        if _is_alone():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return part(*args, **kwargs)

    def _smp_plain_call(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def losses(self) -> list[Any]:
        """Losses of the last call; see `DistributedModel.losses`."""
        return list(self.__dict__[PART].losses)


class LayerModel(DistributedModel):
    """Wraps a layer as a model that is partitioned in its place.

    It runs without microbatches: the layer's output need not have one row per example of the batch,
    and the output for one example may depend on the others.

    Args:
        layer: The layer, already converted to a part.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer: plainly inside another model, otherwise as a partitioned model."""
        if layer_calls.is_inside(args, kwargs) or current_mode() == "plain":
            return self.layer._smp_plain_call(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the original layer."""
        return self.layer._smp_plain_call(*args, **kwargs)

    @property
    def _smp_partitions(self) -> Partitioning:
        return self._smp_partitions_of(self.layer._smp_plain_call, self.layer)

    def _smp_call_whole(self, here: world.World, args: Any, kwargs: Any) -> BatchCallResult:
        return call_with_batch(self, here, args, kwargs, in_one_piece=True)


def is_part(layer: Layer) -> bool:
    """Whether a layer has been converted to a part."""
    return issubclass(type(layer), _Part)


def as_part(layer: Any) -> None:
    """Converts a Keras layer or model that is not distributed to a part, in place."""
    kind: Any = _PartModel if isinstance(layer, keras.Model) else _PartLayer
    # Keras' __setattr__ would track the attributes as state of the layer.
    plain: Any = type(layer)
    object.__setattr__(layer, "__class__", _class_of_parts(kind, plain))
    if kind is _PartLayer:
        layer.__dict__[PART] = LayerModel(layer)
    else:
        registry.add(layer)


@functools.cache
def _class_of_parts(kind: Any, plain: Any) -> Any:
    """Subclass of `kind` and `plain` whose instances report `plain` as their `__class__`.

    Keras reads `__class__` when it saves, clones or describes an object.
    """
    body = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__class__": property(lambda self: plain),
        "_smp_plain": plain,
    }
    return type(plain.__name__, (kind, plain), body)


def _is_alone() -> bool:
    """Whether a call is outside of any step and this process owns all variables of the replica."""
    if current_runner() is not None or current_mode() is not None:
        return False
    return not world.is_initialized() or len(world.current("a part of a model").mp_group) == 1


def _take(layer: Layer, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Intercepts a layer call in a step and converts the layer to a part if a model holds it."""
    if current_mode() == "plain" or isinstance(layer, DistributedModel) or is_part(layer):
        return call(*args, **kwargs)
    if not registry.holders_of(layer)():
        outputs = call(*args, **kwargs)
        if isinstance(layer, keras.Model):
            _know_stranger(layer)
        return outputs
    if not _private.makes_variables(layer):
        return call(*args, **kwargs)
    as_part(layer)
    return layer(*args, **kwargs)


def _know_stranger(model: Any) -> None:
    """Broadcasts the weights of a model that no `DistributedModel` holds, and warns, once."""
    here = world.current("calling a model in a step")
    if model.__dict__.get(_KNOWN) is here or not model.variables:
        return
    model.__dict__[_KNOWN] = here
    if here.config.partitions == 1 and here.size == 1:
        return
    with tf.init_scope():
        ranks = tuple(range(here.size))
        copy_variables(list(model.variables), ranks, 0, "the weights of a plain model")
    _logger.warning(
        "model '%s' is called in a step, but no DistributedModel holds it: it runs whole, and in "
        "several processes in each of them. Expected: models that are attributes of the model "
        "whose step calls them. To split it, make it such an attribute, or write "
        "`%s = smp.DistributedModel.from_keras(%s)` before the first step.",
        model.name,
        model.name,
        model.name,
    )


layer_calls.take_by(_take)
