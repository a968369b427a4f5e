"""Models on disk: weight files of Keras, and graphs of a SavedModel."""

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
    """Context in which TensorFlow does not tell that one of its functions is deprecated."""
    return deprecation.silence()


class _Layout(saving_lib.H5IOStore):
    """A store of weights that notes what is put into it and keeps nothing."""

    def __init__(self) -> None:  # no file is opened
        self.found: dict[str, Any] = {}
        self._at = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> Any:
        """The place of a layer's own weights."""
        self._at = path
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        name = f"{self._at}/vars/{key}".removeprefix("/")
        shape = tuple(value.shape) if hasattr(value, "shape") else ()
        self.found[name] = (getattr(value, "path", name), shape)


def weights_layout(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What Keras would write of a model into a `.weights.h5` file, without reading any weight.

    The optimizer is left out, for it reads its variables before it hands them over. Keras
    itself finds out while it loads, when half of the weights are overwritten.

    Returns:
        Name of each dataset to the path and shape of the variable.
    """
    layout = _Layout()
    done = {id(getattr(model, "optimizer", None))}
    saving_lib._save_state(
        model, weights_store=layout, assets_store=None, inner_path="", visited_saveables=done
    )
    return layout.found


@contextlib.contextmanager
def compilation_kept(model: Any) -> Iterator[None]:
    """Context in which Keras may write a `.h5` file of a model.

    Keras takes the optimizer out of the model's own configuration when it does, so that all
    files that are written afterwards lack it.
    """
    owner: Any = getattr(model, "_compile_config", None)
    kept = None if owner is None else dict(owner.config)
    try:
        yield
    finally:
        if kept is not None:
            owner.config.update(kept)


def in_safe_mode() -> bool:
    """Whether Keras must not make objects now that may run code of whoever wrote the file."""
    return serialization_lib.in_safe_mode() is not False


_OPERATIONS = ("keras.src.ops.", "keras.src.activations.")


def operation_modules() -> dict[str, str]:
    """The module of each operation of Keras that is no layer, by the name of its class.

    Such as `NotEqual`, which `x != 0` is in a Functional model. Their classes are not public:
    `.keras` files name them by these modules.
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
    found.pop("Function", None)  # a graph of operations, which no file has as one of them
    return found


def inlined(graph_def: Any, fetches: Sequence[str]) -> Any:
    """A graph in which the bodies of called functions stand in place of the calls.

    Args:
        graph_def: A `GraphDef` with its library.
        fetches: Names of the tensors that are wanted.
    """
    for function in graph_def.library.function:
        # Names another implementation of the function, which would keep it from being inlined.
        function.attr.pop("api_implements", None)
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    meta_graph = tf.compat.v1.train.export_meta_graph(graph_def=graph_def, graph=graph)
    meta_graph.collection_def["train_op"].node_list.value.extend(fetches)
    config = config_pb2.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.min_graph_nodes = -1  # also small graphs
    rewrites.optimizers.append("function")
    rewrites.function_optimization = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return tf_optimizer.OptimizeGraph(config, meta_graph)
