"""Converts layer configurations of Keras 2 to Keras 3."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from opensmp.errors import SavingError

Config = dict[str, Any]

_RECURRENT = ("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
_CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
# Arguments missing in Keras 3, with the values at which they have no effect.
_DROPPED: dict[str, tuple[Any, ...]] = {
    "time_major": (False, None),
    "dynamic": (False, None),
    "renorm": (False, None),
    "virtual_batch_size": (None,),
    "fused": (True, False, None),
    "adjustment": (None,),
    "input_length": (...,),  # any value: implied by the input shape
    "input_dtype": (...,),
    "experimental_autocast": (True, None),
    "inner_activation": (None,),
}
# Layers got these from base classes that Keras 3 has removed, and never used them.
_NOT_IN_CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "groups": (1, None),
    "filters": (...,),
    "kernel_initializer": (...,),
    "kernel_regularizer": (...,),
    "kernel_constraint": (...,),
}
_GRAPHS = ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceProperty")


@keras.saving.register_keras_serializable("opensmp", "keras2_hard_sigmoid")
def keras2_hard_sigmoid(x: Any) -> Any:
    """Keras 2's `hard_sigmoid`, `clip(0.2 x + 0.5, 0, 1)`; in Keras 3 the slope is 1/6."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


class Upgraded(NamedTuple):
    """A configuration that Keras 3 can read.

    Attributes:
        config: The configuration.
        changed: Whether it differs from the original.
        cudnn: Names of former CuDNN layers to their new classes; their weights have a different
            layout.
    """

    config: Config
    changed: bool
    cudnn: dict[str, str]


def upgraded(config: Config, what: str) -> Upgraded:
    """Converts the configuration of a model to Keras 3; one error lists all that Keras 3 lacks."""
    new = copy.deepcopy(config)
    cudnn: dict[str, str] = {}
    faults: list[str] = []
    for layer in list(_layers(new)):
        _upgrade(layer, cudnn, faults)
    if faults:
        raise SavingError(
            f"{what}: the model was written by Keras 2, and Keras 3 cannot make it: "
            + "; ".join(faults)
            + "."
        )
    return Upgraded(new, new != config, cudnn)


def _layers(node: Any) -> Iterator[Config]:
    """Yields all layer configurations, at any depth."""
    if isinstance(node, dict):
        if "class_name" in node and isinstance(node.get("config"), dict):
            yield node
        for child in node.values():
            yield from _layers(child)
    elif isinstance(node, list):
        for child in node:
            yield from _layers(child)


def _upgrade(layer: Config, cudnn: dict[str, str], faults: list[str]) -> None:
    """Converts one layer configuration in place; appends unsupported features to `faults`."""
    kind, config = layer["class_name"], layer["config"]
    if kind in ("Model", "Functional"):  # "Model" before Keras 2.3
        layer["class_name"] = "Functional"
        for name in ("input_layers", "output_layers"):
            tensors = config.get(name)
            # Keras 2 unpacked a list of one tensor; Keras 3 would return a list.
            if isinstance(tensors, list) and len(tensors) == 1 and isinstance(tensors[0], list):
                config[name] = tensors[0]
        return
    if kind in _GRAPHS:
        faults.append(
            f"layer '{config.get('name')}' is the TensorFlow function "
            f"{config.get('function', kind)!r}, which the file has only the name of: make the "
            "model anew with keras.ops and load the weights into it, "
            "smp.load_model(path, model=model)"
        )
        return
    if kind in _CUDNN:
        kind = layer["class_name"] = _CUDNN[kind]
        cudnn[config["name"]] = kind
        config.update(activation="tanh", recurrent_activation="sigmoid")
        if kind == "GRU":
            config["reset_after"] = True
    elif kind == "GRU":
        config.setdefault("reset_after", False)
    if kind in _RECURRENT and "inner_activation" in config:
        config["recurrent_activation"] = config.pop("inner_activation")
    dropped = dict(_DROPPED)
    if kind.startswith(("Depthwise", "Separable")):
        dropped.update(_NOT_IN_CONVOLUTIONS)
        if kind.startswith("Separable"):
            del dropped["filters"]
    for name in [name for name in dropped if name in config]:
        value, harmless = config.pop(name), dropped[name]
        if harmless != (...,) and value not in harmless:
            faults.append(f"layer '{config.get('name')}' ({kind}) has {name}={value!r}")
    _drop_unset(kind, config)
    axis = config.get("axis")
    if kind == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        config["axis"] = axis[0]
    for name in ("activation", "recurrent_activation"):
        if config.get(name) == "hard_sigmoid":
            config[name] = _HARD_SIGMOID.copy()
    policy = config.get("dtype")
    if isinstance(policy, dict) and policy.get("class_name") in ("Policy", "PolicyV1"):
        config["dtype"] = policy["config"]["name"]


def _drop_unset(kind: str, config: Config) -> None:
    """Removes arguments that the Keras 3 layer does not have and whose value is None or False."""
    owner = getattr(keras.layers, kind, None)
    if owner is None or not (isinstance(owner, type) and issubclass(owner, keras.Layer)):
        return
    known = set(_BASE)
    for each in owner.__mro__:
        if issubclass(each, keras.Layer):
            known |= set(inspect.signature(each).parameters)
    for name in [n for n, value in config.items() if n not in known and value in (None, False)]:
        del config[name]


_BASE = ("batch_input_shape", "batch_shape", "input_shape", "name", "dtype", "trainable", "layers")

_HARD_SIGMOID = {
    "module": "builtins",
    "class_name": "function",
    "config": "keras2_hard_sigmoid",
    "registered_name": "opensmp>keras2_hard_sigmoid",
}
