from __future__ import annotations

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.trace.trace import trace
from opensmp.execution.profiling import calibration
from opensmp.execution.profiling.calibration import (
    cache_folder,
    calibrate,
    device_key,
    graph_key,
    measure,
)

X = tf.ones([8, 6])
FAST = Machine(1e12, 1e11, 1e-6, 1e-5, 1e10)


def model_graph(units=4):
    model = keras.Sequential(
        [
            keras.layers.Dense(units, name="one"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(2, name="top"),
        ]
    )
    model(X)
    model.layers[0].trainable = False
    graph = trace(model.__call__, [X], {"training": True}, name=model.name)
    return graph, coarsen(graph, Machine())


@pytest.fixture
def measurements(monkeypatch):
    """Counts how often a machine is really measured; it is always the same."""
    made = []

    def once(device):
        made.append(device)
        return FAST

    monkeypatch.setattr(calibration, "_measure_machine", once)
    return made


def test_the_cache_is_in_the_folder_of_the_xdg_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "opensmp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "opensmp"


def test_a_device_is_known_by_its_processor_and_threads():
    key = device_key("/job:localhost/replica:0/task:0/device:CPU:1")
    assert key == device_key("CPU:0")
    assert key.startswith("CPU ")
    assert tf.__version__ in key
    assert "1 threads" in key


def test_a_machine_is_measured_once(tmp_path, measurements):
    first = calibrate("CPU:0", cache=tmp_path)
    second = calibrate("CPU:0", cache=tmp_path)
    assert first == second == FAST
    assert measurements == ["CPU:0"]


def test_a_machine_is_measured_again_on_demand(tmp_path, measurements):
    calibrate("CPU:0", cache=tmp_path)
    calibrate("CPU:0", cache=tmp_path, refresh=True)
    assert len(measurements) == 2


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"format": 99, "devices": {}}'])
def test_a_broken_file_is_measured_and_written_anew(tmp_path, measurements, contents):
    (tmp_path / "machines.json").write_text(contents, encoding="utf-8")
    assert calibrate("CPU:0", cache=tmp_path) == FAST
    assert calibrate("CPU:0", cache=tmp_path) == FAST
    assert len(measurements) == 1
    assert json.loads((tmp_path / "machines.json").read_text(encoding="utf-8"))["devices"]


def test_a_measured_machine_is_a_plausible_one(tmp_path):
    machine = calibrate("CPU:0", cache=tmp_path)
    assert 1e8 < machine.flops_per_second < 1e15
    assert 1e8 < machine.bytes_per_second < 1e13
    assert machine.narrow_flops_per_second is not None
    assert 1e6 < machine.narrow_flops_per_second < 1e15
    assert 1e-8 <= machine.operation_seconds < 1e-3
    assert 0 < machine.transfer_seconds < 1
    assert machine.memory_bytes is None


def test_measured_times_replace_predicted_ones_and_nothing_else(tmp_path):
    graph, predicted = model_graph()
    made = measure(graph, predicted, cache=tmp_path)
    assert made.names == predicted.names
    assert (made.forward_seconds > 0).all()
    assert (made.forward_seconds < 1).all()
    assert not np.array_equal(made.forward_seconds, predicted.forward_seconds)
    assert made.backward_seconds[0] == 0  # frozen
    assert made.backward_seconds[-1] > 0
    for field in dataclasses.fields(made):
        if not field.name.endswith("_seconds"):
            assert getattr(made, field.name) is getattr(predicted, field.name)


def test_units_are_measured_once(tmp_path, monkeypatch):
    graph, predicted = model_graph()
    first = measure(graph, predicted, cache=tmp_path)
    monkeypatch.setattr(calibration, "_measure_units", None)
    again_graph, again = model_graph()  # made anew, with other numbers in its names
    second = measure(again_graph, again, cache=tmp_path)
    assert first.forward_seconds.tolist() == second.forward_seconds.tolist()
    assert first.backward_seconds.tolist() == second.backward_seconds.tolist()


def test_the_key_is_of_what_is_computed():
    graph, made = model_graph()
    other, other_made = model_graph()
    wide, wide_made = model_graph(units=5)
    key = graph_key(graph, made, (), 32)
    assert key == graph_key(other, other_made, (), 32)
    assert key != graph_key(wide, wide_made, (), 32)
    assert key != graph_key(graph, made, [graph.variables[0].placeholder], 32)


def test_a_unit_that_cannot_be_run_alone_keeps_its_prediction(tmp_path, monkeypatch):
    graph, predicted = model_graph()
    monkeypatch.setattr(calibration, "segment_seconds", lambda *args, **kwargs: None)
    made = measure(graph, predicted, cache=tmp_path)
    assert made.forward_seconds.tolist() == predicted.forward_seconds.tolist()
    assert made.backward_seconds.tolist() == predicted.backward_seconds.tolist()
