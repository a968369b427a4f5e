"""`smp.SavedModelLayer`: a TensorFlow SavedModel as a Keras layer that can be partitioned."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.trace import partition_tags
from opensmp.errors import SavingError

_WHAT = "smp.SavedModelLayer"


@dataclass(frozen=True, eq=False)
class Signature:
    """One function of a SavedModel, as a graph in which all calls are inlined.

    Attributes:
        graph_def: The graph, without inputs, variables and their reads.
        inputs: Name of each input to name, dtype and shape of its tensor.
        outputs: Name of each output to the name of its tensor.
        reads: Tensor name of each variable read to the index of the variable.
        variables: Name, value and trainability of each variable.
    """

    graph_def: Any
    inputs: Mapping[str, tuple[str, Any, Any]]
    outputs: Mapping[str, str]
    reads: Mapping[str, int]
    variables: tuple[tuple[str, Any, bool], ...]


@keras.saving.register_keras_serializable("opensmp")
class SavedModelLayer(keras.layers.Layer):
    """A signature of a SavedModel as a layer with its own weights and individual operations.

    `keras.layers.TFSMLayer` calls the saved function as one operation, which cannot be partitioned;
    this layer adds the individual operations to the graph, so that opensmp can cut between them. It
    also reads SavedModels of Keras 2, including the state of an old optimizer in them.

    The function runs as it was saved: usually for inference, without dropout and with
    `BatchNormalization` in inference mode, even during training.

    Args:
        filepath: Directory of the SavedModel. Its graph can read and write files: load only those
            that you trust.
        signature: Name of the signature.
        trainable: Whether its weights are trainable, except those that were not when it was saved.
        name: Name of the layer.
        dtype: As in any layer; the computation keeps the saved dtypes.

    Raises:
        SavingError: The SavedModel cannot be read, or has no such signature.

    Example:
        ```python
        layer = smp.SavedModelLayer("served/1")
        inputs = keras.Input((224, 224, 3))
        model = smp.DistributedModel(inputs, keras.layers.Dense(10)(layer(inputs)))
        ```
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        signature: str = "serving_default",
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(trainable=trainable, name=name, dtype=dtype)
        self.filepath = os.fspath(filepath)
        self.signature_name = signature
        self._read = read_signature(self.filepath, signature)
        self._own: list[Any] = []
        for label, value, trained in self._read.variables:
            self._own.append(
                self.add_weight(
                    name=label.replace("/", "_").replace(":", "_"),
                    shape=value.shape,
                    dtype=value.dtype.name,
                    trainable=trained,
                    initializer=_Value(value),
                )
            )
        self._read = _without_values(self._read)
        self._function = tf.function(self._run, autograph=False)
        self.built = True

    @property
    def input_specs(self) -> dict[str, Any]:
        """A `tf.TensorSpec` for each input, by name."""
        return {
            name: tf.TensorSpec(shape, dtype, name=name)
            for name, (_, dtype, shape) in self._read.inputs.items()
        }

    def call(self, inputs: Any) -> Any:
        """Runs the signature.

        Args:
            inputs: A tensor, or several: a dict by input name, or a list in alphabetical order of
                the names.

        Returns:
            A tensor, or a dict of tensors if the signature has several outputs.
        """
        given = self._named(inputs)
        graph = partition_tags.traced_graph()
        traced = graph is not None and graph is tf.compat.v1.get_default_graph()
        # Tapes do not record imported operations; a tf.function provides its gradient itself.
        return self._run(given) if traced else self._function(given)

    def _named(self, inputs: Any) -> dict[str, Tensor]:
        names = list(self._read.inputs)
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            given = dict(zip(names, values, strict=False)) if len(values) == len(names) else {}
        if sorted(given) != sorted(names):
            received = list(given) or type(inputs).__name__
            raise SavingError(
                f"{_WHAT} '{self.name}': expected the inputs {names}, received {received}."
            )
        specs = self._read.inputs
        return {name: tf.cast(tensor, specs[name][1]) for name, tensor in given.items()}

    def _run(self, given: Mapping[str, Tensor]) -> Any:
        # Identities belong to the graph being built, whichever graph the inputs come from.
        feeds = {self._read.inputs[name][0]: tf.identity(x) for name, x in given.items()}
        values: dict[int, Tensor] = {}
        for tensor, index in self._read.reads.items():
            if index not in values:
                values[index] = tf.convert_to_tensor(self._own[index])
            feeds[tensor] = values[index]
        wanted = list(self._read.outputs.values())
        found = tf.graph_util.import_graph_def(
            self._read.graph_def, input_map=feeds, return_elements=wanted, name=self.name
        )
        if len(wanted) == 1:
            return found[0]
        return dict(zip(self._read.outputs, found, strict=True))

    def get_config(self) -> dict[str, Any]:
        """The configuration; loading it needs the SavedModel at the same path."""
        own = {"filepath": self.filepath, "signature": self.signature_name}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SavedModelLayer:
        """Creates the layer from its configuration, unless Keras' safe mode is on.

        Raises:
            ValueError: Safe mode is on, as for `keras.layers.TFSMLayer`.
        """
        if _private.in_safe_mode():
            raise ValueError(
                "Requested the deserialization of a `SavedModelLayer`, which loads an external "
                "SavedModel. This carries a potential risk of arbitrary code execution and thus "
                "it is disallowed by default. If you trust the source of the artifact, you can "
                "override this error by passing `safe_mode=False` to the loading function, or "
                "calling `keras.config.enable_unsafe_deserialization()`."
            )
        return cls(**config)


class _Value(keras.initializers.Initializer):
    """An initializer that returns a given array."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return tf.convert_to_tensor(self._array, dtype=dtype)

    def clone(self) -> _Value:
        return self


def _without_values(read: Signature) -> Signature:
    """Drops the values of variables, so that their memory can be freed."""
    names = tuple((name, None, trained) for name, _, trained in read.variables)
    return Signature(read.graph_def, read.inputs, read.outputs, read.reads, names)


def read_signature(path: str | os.PathLike[str], signature: str) -> Signature:
    """Reads one signature of a SavedModel and its variables, on the host."""
    name = os.fspath(path)
    if not Path(name, "saved_model.pb").is_file():
        raise SavingError(f"{_WHAT}: {name} is not the directory of a SavedModel.")
    graph = tf.Graph()
    try:
        with graph.as_default(), _session(graph) as session, _private.silence_deprecations():
            meta = tf.compat.v1.saved_model.load(session, ["serve"], name)
            found = _signature(meta, signature, name)
            values = _values(graph, session)
    except (tf.errors.OpError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, SavingError):
            raise
        raise SavingError(
            f"{_WHAT}: the SavedModel in {name} cannot be read, or is half written: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from error
    inputs = {
        key: (info.name, tf.as_dtype(info.dtype), _shape(info))
        for key, info in sorted(found.inputs.items())
    }
    outputs = {key: info.name for key, info in sorted(found.outputs.items())}
    tensors = [*(name for name, _, _ in inputs.values()), *outputs.values()]
    flat = _private.inlined(graph.as_graph_def(), tensors)
    ends = sorted({tensor.split(":")[0] for tensor in outputs.values()})
    with _private.silence_deprecations():
        flat = tf.compat.v1.graph_util.extract_sub_graph(flat, ends)
    trainable = {
        node.variable.name: node.variable.trainable
        for node in meta.object_graph_def.nodes
        if node.WhichOneof("kind") == "variable"
    }
    return _cut(flat, inputs, outputs, values, trainable)


def _session(graph: Any) -> Any:
    config = tf.compat.v1.ConfigProto(device_count={"GPU": 0, "CPU": 1})
    return tf.compat.v1.Session(graph=graph, config=config)


def _signature(meta: Any, signature: str, path: str) -> Any:
    known = [name for name in meta.signature_def if not name.startswith("__")]
    if signature not in known:
        raise SavingError(
            f"{_WHAT}: the SavedModel in {path} has no signature {signature!r}; it has "
            f"{', '.join(map(repr, known)) or 'none'}."
        )
    return meta.signature_def[signature]


def _shape(info: Any) -> Any:
    shape = info.tensor_shape
    if shape.unknown_rank:
        return tf.TensorShape(None)
    return tf.TensorShape([each.size if each.size >= 0 else None for each in shape.dim])


def _values(graph: Any, session: Any) -> dict[str, tuple[str, Any]]:
    """Name in the SavedModel and value of each initialized variable, by the name of its handle."""
    handles = [op for op in graph.get_operations() if op.type == "VarHandleOp"]
    with graph.as_default():
        reads = [
            tf.raw_ops.ReadVariableOp(resource=op.outputs[0], dtype=op.get_attr("dtype"))
            for op in handles
        ]
        there = session.run(
            [tf.raw_ops.VarIsInitializedOp(resource=op.outputs[0]) for op in handles]
        )
    wanted = [read for read, is_there in zip(reads, there, strict=True) if is_there]
    found = iter(session.run(wanted))
    return {
        op.name: (op.get_attr("shared_name").decode(), next(found))
        for op, is_there in zip(handles, there, strict=True)
        if is_there
    }


def _cut(
    graph_def: Any,
    inputs: Mapping[str, tuple[str, Any, Any]],
    outputs: Mapping[str, str],
    values: Mapping[str, tuple[str, Any]],
    trainable: Mapping[str, bool],
) -> Signature:
    """Removes inputs and variable reads from a graph, so that they can be fed."""
    nodes = {node.name: node for node in graph_def.node}

    def handle(name: str) -> str | None:
        node = nodes.get(name.split(":")[0].lstrip("^"))
        while node is not None and node.op in ("Identity", "Enter") and node.input:
            node = nodes.get(node.input[0].split(":")[0])
        return node.name if node is not None and node.op == "VarHandleOp" else None

    reads: dict[str, int] = {}
    order: list[str] = []
    fed = {name.split(":")[0] for name, _, _ in inputs.values()}
    versions = tf.Graph().as_graph_def().versions  # without it TensorFlow warns at each import
    kept = tf.compat.v1.GraphDef(versions=versions, library=graph_def.library)
    gone = set(fed)
    for node in graph_def.node:
        source = handle(node.input[0]) if node.op == "ReadVariableOp" else None
        if source is not None:
            if source not in order:
                order.append(source)
            reads[f"{node.name}:0"] = order.index(source)
            gone.add(node.name)
    reading = {name for name in nodes if handle(name)}
    gone |= reading
    for node in graph_def.node:
        if node.name in gone:
            continue
        if any(edge.split(":")[0] in reading for edge in node.input if edge[0] != "^"):
            raise SavingError(
                f"{_WHAT}: the SavedModel's operation {node.name} ({node.op}) takes a variable "
                "itself and not its value, as loops, branches and assignments do; it cannot be "
                "taken apart. Use keras.layers.TFSMLayer, which runs it as a whole."
            )
        new = kept.node.add()
        new.CopyFrom(node)
        edges = [e for e in new.input if not (e[0] == "^" and e[1:] in gone)]
        del new.input[:]
        new.input.extend(edges)
        new.device = ""
        new.attr.pop("_class", None)
    variables = []
    for name in order:
        label, value = values[name]
        # A duplicate name has a number appended in the graph.
        said = trainable.get(label, trainable.get(re.sub(r"_\d+$", "", label), True))
        can_train = np.issubdtype(value.dtype, np.floating)
        variables.append((label or name, value, bool(said) and can_train))
    return Signature(kept, inputs, outputs, reads, tuple(variables))


def saved_model_as_keras(path: str | os.PathLike[str]) -> Any:
    """Wraps a SavedModel in a Functional Keras model."""
    layer = SavedModelLayer(path)
    inputs = {
        name: keras.Input(batch_shape=tuple(spec.shape), dtype=spec.dtype.name, name=name)
        for name, spec in layer.input_specs.items()
    }
    given = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return keras.Model(given, layer(given))
