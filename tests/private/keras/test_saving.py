"""Canaries of models on disk."""

from __future__ import annotations

import h5py
import keras
import tensorflow as tf

from opensmp import _private


def test_silence_deprecations(caplog):
    with _private.silence_deprecations():
        tf.compat.v1.train.checkpoint_exists("/nothing")
    assert "deprecated" not in caplog.text


def test_weights_layout(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="top")])
    layout = _private.weights_layout(model)
    assert sorted((path.split("/")[-1], shape) for path, shape in layout.values()) == [
        ("bias", (2,)),
        ("kernel", (3, 2)),
    ]
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        for name, (_, shape) in layout.items():
            assert file[name].shape == shape


def test_compilation_kept(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with _private.compilation_kept(model):
        model.save(tmp_path / "model.h5")
    assert model.get_compile_config()["optimizer"]


def test_in_safe_mode():
    assert _private.in_safe_mode()
    keras.config.enable_unsafe_deserialization()
    try:
        assert not _private.in_safe_mode()
    finally:
        keras.utils.clear_session(free_memory=False)
    assert _private.in_safe_mode()


def test_inlined():
    twice = tf.function(lambda x: x + x, autograph=False)
    spec = tf.TensorSpec([2])
    outer = tf.function(lambda x: twice(x) * 3.0, input_signature=[spec], autograph=False)
    graph = outer.get_concrete_function().graph
    tensors = [*(t.name for t in graph.inputs), *(t.name for t in graph.outputs)]
    kinds = {node.op for node in _private.inlined(graph.as_graph_def(), tensors).node}
    assert {"AddV2", "Mul"} <= kinds
    assert not any(kind.endswith("PartitionedCall") for kind in kinds)


def test_operation_modules(tmp_path):
    modules = _private.operation_modules()
    x = keras.Input((3,))
    outputs = keras.ops.relu(x) + keras.ops.logsumexp(x, keepdims=True) * keras.ops.cast(
        x != 0, "float32"
    )
    model = keras.Model(x, outputs)
    kinds = {type(op) for op in model.operations if not isinstance(op, keras.Layer)}
    assert {kind.__name__: kind.__module__ for kind in kinds}.items() <= modules.items()
    assert "Dense" not in modules
    config = keras.saving.serialize_keras_object(next(iter(model.operations[1:])))
    assert modules[config["class_name"]] == config["module"]
