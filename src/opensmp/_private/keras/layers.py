"""Keras layers: call hooks, nested layers, losses, and the masks and logits attached to tensors."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as keras_backend
from keras.src.ops.function import Function
from keras.src.ops.node import Node

from opensmp._private.patching import replaced
from opensmp.base.types import Tensor


def in_stateless_scope() -> bool:
    """Whether a Keras `StatelessScope` is active (`stateless_call`, shape inference)."""
    return bool(keras_backend.in_stateless_scope())


def forget_compiled_functions(model: Any, moved: Collection[int] | None = None) -> None:
    """Makes `fit`, `evaluate` and `predict` of a model and its nested models retrace.

    Their compiled functions hold the memory that variables had before they moved. With `moved`, ids
    of variables, models without any of them keep their traces.
    """
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            continue
        if moved is None or any(id(v) in moved for v in layer.variables):
            layer.train_function = layer.test_function = layer.predict_function = None


def get_mask(tensor: Tensor) -> Tensor | None:
    """The Keras mask attached to a tensor."""
    return keras_backend.get_keras_mask(tensor)


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Attaches a Keras mask to a tensor."""
    keras_backend.set_keras_mask(tensor, mask)


def get_logits(tensor: Tensor) -> Tensor | None:
    """The logits that Keras attached to a tensor of probabilities.

    Keras' cross-entropies use them instead of the probabilities, which changes the result wherever
    a probability is small.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Tensor, logits: Tensor) -> None:
    """Attaches logits to a tensor of probabilities, for Keras' cross-entropies."""
    tensor._keras_logits = logits


def regularization_losses(layer: Any) -> list[Tensor]:
    """Weight regularization losses only; `layer.losses` also contains activity losses."""
    return list(layer._get_regularization_losses())


def own_losses(layer: Any) -> list[Tensor]:
    """Losses that a layer and its sublayers added in the last call, without weight penalties."""
    return [loss for each in all_layers(layer) for loss in each._get_own_losses()]


def order_losses(layer: Any) -> list[Any]:
    """Sorts the losses of the active `StatelessScope` into the order of `layer.losses`.

    The scope collects them in call order; Keras lists them layer by layer.

    Returns:
        The layer that added each loss; empty outside a `StatelessScope`.
    """
    if not in_stateless_scope():
        return []
    pairs = [(each, loss) for each in all_layers(layer) for loss in each._get_own_losses()]
    keras_backend.get_stateless_scope().losses[:] = [loss for _, loss in pairs]
    return [each for each, _ in pairs]


def keep_losses(layer: Any, owners: Sequence[Any], losses: Sequence[Tensor]) -> None:
    """Replaces the losses stored in a layer and its nested layers, as a plain call would."""
    layer._clear_losses()
    for owner, loss in zip(owners, losses, strict=True):
        owner._losses.append(loss)


def layer_calls(around: Callable[[Any], Any]) -> Any:
    """Context in which every Keras layer call runs inside the context `around(layer)`.

    Name scopes do not identify layers: layers are shared, and functions are nested.
    """

    def make(original: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            with around(self):
                return original(self, *args, **kwargs)

        return __call__

    return replaced(keras.layers.Layer, "__call__", make)


def layer_calls_by(run: Callable[..., Any]) -> Any:
    """Context in which `run(layer, call, args, kwargs)` performs every Keras layer call.

    `call` is the original unbound method and takes the layer first. The class is patched because
    Python looks up `__call__` on the class, and the class of a user's layer must not change.
    """

    def make(original: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, original, args, kwargs)

        return __call__

    return replaced(keras.layers.Layer, "__call__", make)


def makes_variables(layer: Any) -> bool:
    """Whether a layer has variables, or may create some in its first call."""
    if layer.variables:
        return True
    return any(not each.built and not _is_default_build(each) for each in all_layers(layer))


def _is_default_build(layer: Any) -> bool:
    return type(layer).build is keras.layers.Layer.build


def functional_nodes(around: Callable[[Any], Any]) -> Any:
    """Context in which each node of a Functional model runs inside the context `around(node)`.

    The hook receives the `Node`, because one layer may have several. Keras' per-call hook receives
    only the layer; nodes are matched to it by their order of execution.
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
    """Context in which `created(node)` is called for every new node of a Functional graph."""

    def make(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            created(self)

        return __init__

    return replaced(Node, "__init__", make)


def in_symbolic_scope() -> bool:
    """Whether Keras runs a layer only to infer output shapes, in a scratch graph."""
    return bool(keras_backend.in_symbolic_scope())


def is_variable_creation_error(error: Exception) -> bool:
    """Whether the error is Keras' refusal to create a variable inside a `StatelessScope`."""
    return "create a variable while in a stateless scope" in " ".join(str(error).split())


def eager_builds() -> Any:
    """Context in which layers run `build` outside any graph.

    A layer that stores a tensor computed in `build` would otherwise store a tensor of the graph of
    its first call, which later calls cannot use. Keras sets `build` on each layer object, so
    patching the class has no effect.
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


def all_layers(model: Any) -> list[Any]:
    """The model and all nested layers at any depth; the public `layers` has the top level only."""
    return list(model._flatten_layers())


def layers_inside(layer: Any) -> list[Any]:
    """The direct sublayers of a layer; the public `layers` exists for models only."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


def own_variables(layer: Any) -> list[Any]:
    """Variables of a layer, without those of its sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


BOOKKEEPING = frozenset(
    {
        "_allow_non_tensor_positional_args",
        "_auto_config",
        "_batch_shape",
        "_build_shapes_dict",
        "_call_context_args",
        "_call_has_context_arg",
        "_call_has_mask_arg",
        "_call_has_training_arg",
        "_call_signature",
        "_called",
        "_compile_config",
        "_compile_loss",
        "_compile_metrics",
        "_compiled_trainable_state",
        "_compute_loss_has_training_arg",
        "_convert_input_args",
        "_distribute_strategy",
        "_eval_epoch_iterator",
        "_functional",
        "_inbound_nodes",
        "_initial_epoch",
        "_input_spec",
        "_input_tensor",
        "_inputs",
        "_inputs_struct",
        "_jit_compile",
        "_layers",
        "_lock",
        "_loss_ids",
        "_loss_tracker",
        "_losses",
        "_losses_override",
        "_metrics",
        "_nodes",
        "_nodes_by_depth",
        "_non_trainable_variables",
        "_operations",
        "_operations_by_depth",
        "_outbound_nodes",
        "_outputs",
        "_outputs_struct",
        "_parent_path",
        "_path",
        "_remat_mode",
        "_run_eagerly",
        "_saved_model_arg_spec",
        "_saved_model_inputs_spec",
        "_seed_generators",
        "_self_name_based_restores",
        "_self_saveable_object_factories",
        "_self_setattr_tracking",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_deferred_dependencies",
        "_self_unconditional_dependency_names",
        "_self_update_uid",
        "_tracked",
        "_tracker",
        "_trainable_variables",
        "built",
        "call_signature_parameters",
        "compiled",
        "history",
        "predict_function",
        "stop_training",
        "test_function",
        "train_function",
    }
)
"""Attributes of layers and models that Keras and TensorFlow set for themselves.

No call of a layer computes with them. Others of theirs, such as `_trainable` and `_dtype_policy`,
change what a call computes.
"""
