"""Parts of a model that its steps call by themselves: each is split as a model of its own.

The `train_step` of a GAN or of an autoencoder calls the models that it holds, and never itself.
When such a step is traced, each layer of the model that is called there becomes a part. It stays
the object that it is, of the class that its `__class__` says; what changes is what a call of it
does. Inside of a split model it is a plain layer, as ever.
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
from opensmp.distributed import world
from opensmp.distributed.collectives.variable_moves import copy_variables
from opensmp.execution.context import current_runner
from opensmp.execution.models import layer_calls, registry
from opensmp.execution.models.nested_models import PART
from opensmp.execution.partitioning import Partitioning
from opensmp.training.batch.batch_call import WholeResult, call_whole
from opensmp.training.batch.batch_split import NotByRows
from opensmp.training.call_mode import current_mode

Layer = Any

_logger = logging.getLogger("opensmp")
_IN_ONE_PIECE = "_smp_in_one_piece"
_KNOWN = "_smp_known_stranger"


class _Part:
    """What is common to the classes of parts."""

    _smp_is_part = True


class _PartModel(_Part, DistributedModel):
    """A model that a step has called by itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it split in steps, and in processes that have a part of it only; else plainly."""
        if _is_alone():
            return super(DistributedModel, self).__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _smp_call_whole(self, here: world.World, args: Any, kwargs: Any) -> WholeResult:
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
        return call_whole(self, here, args, kwargs, in_one_piece=True)


class _PartLayer(_Part):
    """A layer that is no model, and that a step has called by itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As that of a part that is a model."""
        part: LayerModel = self.__dict__[PART]
        if _is_alone():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return part(*args, **kwargs)

    def _smp_plain_call(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def losses(self) -> list[Any]:
        """As those of a model; see `DistributedModel.losses`."""
        return list(self.__dict__[PART].losses)


class LayerModel(DistributedModel):
    """A layer as a model, which is split in its place.

    It runs in one piece: what a layer gives need not have a row for each example of a batch, and
    what it gives for one may depend on the others.

    Args:
        layer: The layer, a part.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer."""
        if layer_calls.is_inside(args, kwargs) or current_mode() == "plain":
            return self.layer._smp_plain_call(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer plainly."""
        return self.layer._smp_plain_call(*args, **kwargs)

    @property
    def _smp_partitions(self) -> Partitioning:
        return self._smp_partitions_of(self.layer._smp_plain_call, self.layer)

    def _smp_call_whole(self, here: world.World, args: Any, kwargs: Any) -> WholeResult:
        return call_whole(self, here, args, kwargs, in_one_piece=True)


def is_part(layer: Layer) -> bool:
    """Whether a layer has become a part."""
    return issubclass(type(layer), _Part)


def as_part(layer: Any) -> None:
    """Makes a layer a part; it stays the same object.

    Args:
        layer: A Keras layer or model that is not distributed.
    """
    kind: Any = _PartModel if isinstance(layer, keras.Model) else _PartLayer
    # Keras' own __setattr__ takes attributes of a layer to be its state.
    plain: Any = type(layer)
    object.__setattr__(layer, "__class__", _class_of_parts(kind, plain))
    if kind is _PartLayer:
        layer.__dict__[PART] = LayerModel(layer)
    else:
        registry.add(layer)


@functools.cache
def _class_of_parts(kind: Any, plain: Any) -> Any:
    """The class of parts that were of class `plain`, and that say they still are.

    Keras asks for `__class__` where it saves, clones or describes an object.
    """
    body = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__class__": property(lambda self: plain),
        "_smp_plain": plain,
    }
    return type(plain.__name__, (kind, plain), body)


def _is_alone() -> bool:
    """Whether a call is none of a step, and all variables of a replica are in this process."""
    if current_runner() is not None or current_mode() is not None:
        return False
    return not world.is_initialized() or len(world.current("a part of a model").mp_group) == 1


def _take(layer: Layer, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Does a call of a layer that a step makes."""
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
    """Makes a model that no split model holds the same in all processes, and tells of it."""
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
