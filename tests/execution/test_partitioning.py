from __future__ import annotations

import json
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import opensmp as smp
from opensmp import _private
from opensmp.compiler.plan.plan import Plan
from opensmp.errors import PlanError


def mlp(name: str = "mlp") -> keras.Model:
    keras.utils.set_random_seed(3)
    inputs = keras.Input([16])
    x = inputs
    for _ in range(4):
        x = layers.Dense(16, activation="relu")(x)
    return keras.Model(inputs, layers.Dropout(0.1)(x), name=name)


def distributed(name: str = "mlp") -> smp.DistributedModel:
    return smp.DistributedModel.from_keras(mlp(name))


def homes(model: keras.Model) -> list[int]:
    """The device number of each kernel."""
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, layers.Dense)]
    return [int(kernel.value.device.rsplit(":", 1)[1]) for kernel in kernels]


def saved_plan(path, places: list[int], partitions: int = 2) -> None:
    """Writes a plan of `mlp` that puts its four layers where `places` says."""
    smp.init({"partitions": partitions})
    model = distributed()
    model(tf.zeros([4, 16]))
    model.plan.save(path)
    data = json.loads(path.read_text())
    dense = [label for label in data["layers"] if label.startswith("dense")]
    data["layers"] = {"*": places[-1], **dict(zip(dense, places, strict=True))}
    path.write_text(json.dumps(data))
    smp.shutdown()


@pytest.fixture
def batch():
    return tf.constant(np.random.default_rng(0).normal(size=(8, 16)), tf.float32)


# --- model.plan --------------------------------------------------------------------------------


def test_model_has_no_plan_before_its_first_call(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(PlanError, match=r"model 'mlp' has no plan yet.*called for the first time"):
        distributed().plan  # noqa: B018


@pytest.mark.parametrize("keys", [{}, {"auto_partition": False, "default_partition": 1}])
def test_plan_of_a_model_is_where_its_variables_are(keys, smp_init, batch):
    smp_init({"partitions": 2, **keys})
    model = distributed()
    model(batch)
    places = [p for label, p in model.plan.layers.items() if label.startswith("dense")]
    if keys:
        assert model.plan.layers == {"*": 1, **dict.fromkeys(list(model.plan.layers)[1:], 1)}
    else:
        assert places == homes(model)
        assert set(places) == {0, 1}
    assert "predicted step" in str(model.plan)
    assert model.plan.source == ("manual" if keys else "auto")


def test_plan_is_that_of_the_first_call(smp_init, batch):
    smp_init({"partitions": 2, "microbatches": 2})
    model = distributed()

    @smp.step
    def forward(x):
        return model(x, training=True)

    forward(batch)
    plan = model.plan
    model(batch[:3])
    assert model.plan is plan
    assert homes(model) == [p for k, p in plan.layers.items() if k.startswith("dense")]


def test_attribute_of_a_users_model_wins_over_the_plan(smp_init):
    class Net(smp.DistributedModel):
        def __init__(self):
            super().__init__()
            self.plan = layers.Dense(2)

        def call(self, x):
            return self.plan(x)

    smp_init({"partitions": 1})
    net = Net()
    assert net(tf.zeros([1, 3])).shape == (1, 2)
    assert isinstance(net.plan, layers.Dense)


def test_empty_partition_is_logged_once(smp_init, caplog):
    smp_init({"partitions": 4, "auto_partition": False, "default_partition": 2})
    model = distributed()
    with caplog.at_level(logging.WARNING, "opensmp"):
        model(tf.zeros([2, 16]))
        model(tf.zeros([3, 16]), training=True)
    (record,) = [record for record in caplog.records if "empty" in record.message]
    assert "model 'mlp': partitions 0, 1, 3 are empty" in record.message


# --- variables -----------------------------------------------------------------------------------


class Failing(smp.DistributedModel):
    """Its layers are built, and then it fails while `fails`."""

    def __init__(self, tracked: bool):
        super().__init__(name="failing")
        dense = layers.Dense(3, kernel_initializer="ones")
        self.fails, self.dense = True, dense if tracked else lambda x: dense(x)
        self.kernel = lambda: dense.kernel

    def call(self, x):
        x = self.dense(x)
        if self.fails:
            raise KeyError("no such layer")
        return x


@pytest.mark.parametrize("tracked", [True, False])
def test_weights_of_a_call_that_failed_get_their_memory_with_their_own_model(tracked, smp_init):
    smp_init({"partitions": 2})
    failing = Failing(tracked)
    with pytest.raises(KeyError):
        failing(tf.ones([1, 2]))
    assert not _private.is_initialized(failing.kernel())
    distributed()(tf.zeros([2, 16]))
    assert not _private.is_initialized(failing.kernel())
    failing.fails = False
    assert failing(tf.ones([1, 2])).numpy().tolist() == [[2.0, 2.0, 2.0]]
    assert _private.is_initialized(failing.kernel())
    assert _private.take_pending_variables() == []


# --- a plan from a file --------------------------------------------------------------------------


def test_plan_of_a_file_is_followed_and_computes_the_same(tmp_path, smp_init, batch):
    path = tmp_path / "plan.json"
    saved_plan(path, [0, 1, 0, 1])
    expected = mlp()(batch)
    smp_init({"partitions": 2, "microbatches": 2, "plan": path})
    model = distributed()

    @smp.step
    def forward(x):
        return model(x)

    np.testing.assert_allclose(forward(batch).merge(), expected, rtol=1e-6)
    assert homes(model) == [0, 1, 0, 1]
    assert model.plan.source == str(path)


def test_inference_may_come_before_training_under_a_plan(tmp_path, smp_init, batch):
    path = tmp_path / "plan.json"
    saved_plan(path, [1, 0, 0, 1])
    smp_init({"partitions": 2, "plan": path})
    model = distributed()
    model(batch)
    model(batch[:2], training=True)
    assert homes(model) == [1, 0, 0, 1]


def test_saved_plan_of_a_plan_from_a_file_is_the_same(tmp_path, smp_init, batch):
    path, again = tmp_path / "plan.json", tmp_path / "again.json"
    saved_plan(path, [0, 0, 1, 1])
    smp_init({"partitions": 2, "plan": path})
    model = distributed()
    model(batch)
    model.plan.save(again)
    assert list(Plan.load(again).layers.values()) == list(model.plan.layers.values())


def test_each_model_may_have_a_plan_of_its_own(tmp_path, smp_init, batch):
    path = tmp_path / "plan.json"
    saved_plan(path, [1, 1, 1, 0])
    smp_init({"partitions": 2, "plan": {"student": path}})
    student, teacher = distributed("student"), distributed("teacher")
    student(batch)
    teacher(batch)
    assert homes(student) == [1, 1, 1, 0]
    assert teacher.plan.source == "auto"


def test_plan_for_another_model_is_refused_at_the_first_call(tmp_path, smp_init):
    path = tmp_path / "plan.json"
    saved_plan(path, [0, 0, 1, 1])
    smp_init({"partitions": 2, "plan": path})
    other = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input([3]), layers.Dense(2)], name="other")
    )
    with pytest.raises(PlanError, match=r"plan\.json\): it does not fit model 'other'"):
        other(tf.zeros([1, 3]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "is no plan"),
        (None, "cannot be read"),
    ],
)
def test_broken_plan_is_refused_by_init_and_changes_nothing(text, message, tmp_path, smp_init):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=message):
        smp_init({"partitions": 2, "plan": path})
    assert not smp.is_initialized()


def test_plan_for_another_number_of_partitions_is_refused_by_init(tmp_path, smp_init):
    path = tmp_path / "plan.json"
    saved_plan(path, [0, 0, 1, 1])
    with pytest.raises(PlanError, match=r"it has 2 partitions, but the configuration has 4"):
        smp_init({"partitions": 4, "plan": path})
