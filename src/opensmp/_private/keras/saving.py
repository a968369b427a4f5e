"""Saving models: Keras weight files, `.keras` files and SavedModel graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.saving import saving_lib, serialization_lib
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.util import deprecation


def silence_deprecations() -> Any:
    """Context that suppresses TensorFlow's deprecation warnings."""
    return deprecation.silence()


class _Layout(saving_lib.H5IOStore):
    """A weight store that records names and shapes, and stores no values."""

    def __init__(self) -> None:  # does not call the base class, which would open a file
        self.found: dict[str, Any] = {}
        self._at = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> Any:
        """Selects the path under which a layer stores its own weights."""
        self._at = path
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        name = f"{self._at}/vars/{key}".removeprefix("/")
        shape = tuple(value.shape) if hasattr(value, "shape") else ()
        self.found[name] = (getattr(value, "path", name), shape)


def weights_layout(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dataset name in a `.weights.h5` file to path and shape of the variable, without reading any.

    The optimizer is left out because it reads its variables before it passes them to the store.
    Lets a mismatch be found before loading: Keras itself notices only after it has overwritten some
    weights.
    """
    layout = _Layout()
    done = {id(getattr(model, "optimizer", None))}
    saving_lib._save_state(
        model, weights_store=layout, assets_store=None, inner_path="", visited_saveables=done
    )
    return layout.found


@contextlib.contextmanager
def compilation_kept(model: Any) -> Iterator[None]:
    """Context that restores a model's compile configuration after Keras writes a `.h5` file.

    Keras removes the optimizer from the configuration when it writes one, so that files written
    later would lack it.
    """
    owner: Any = getattr(model, "_compile_config", None)
    kept = None if owner is None else dict(owner.config)
    try:
        yield
    finally:
        if kept is not None:
            owner.config.update(kept)


def in_safe_mode() -> bool:
    """Whether Keras must refuse to deserialize objects that may run code from an untrusted file."""
    return serialization_lib.in_safe_mode() is not False


_OPERATIONS = ("keras.src.ops.", "keras.src.activations.")


def operation_modules() -> dict[str, str]:
    """Class name to module for each Keras operation that is not a layer.

    An example is `NotEqual`, which `x != 0` adds to a Functional model. These classes are not
    public, and `.keras` files refer to them by module.
    """
    found: dict[str, str] = {}
    pending: list[Any] = [keras.Operation]
    while pending:
        for kind in pending.pop().__subclasses__():
            if issubclass(kind, keras.Layer):
                continue
            pending.append(kind)
            if kind.__module__.startswith(_OPERATIONS) and not kind.__name__.startswith("_"):
                found[kind.__name__] = kind.__module__
    found.pop("Function", None)  # a graph of operations, which files never store as one operation
    return found


def inlined(graph_def: Any, fetches: Sequence[str]) -> Any:
    """Inlines all function calls of a graph."""
    for function in graph_def.library.function:
        # This attribute names an alternative implementation and would prevent inlining.
        function.attr.pop("api_implements", None)
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    meta_graph = tf.compat.v1.train.export_meta_graph(graph_def=graph_def, graph=graph)
    meta_graph.collection_def["train_op"].node_list.value.extend(fetches)
    config = config_pb2.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.min_graph_nodes = -1  # optimize small graphs too
    rewrites.optimizers.append("function")
    rewrites.function_optimization = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return tf_optimizer.OptimizeGraph(config, meta_graph)
