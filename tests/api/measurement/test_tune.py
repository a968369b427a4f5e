from __future__ import annotations

import json
import random
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.compiler.plan.plan import Plan
from opensmp.errors import StepError
from opensmp.execution.profiling.tuning.trial import TUNED


@pytest.fixture(autouse=True)
def two_partitions():
    smp.shutdown()
    smp.init({"partitions": 2, "microbatches": 2, "devices": ["CPU:0", "CPU:1"]})
    yield
    smp.shutdown()


def make_model(seed: int = 3, lazy: bool = False) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.4),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dropout(0.4),
        keras.layers.Dense(3),
    ]
    if not lazy:
        layers.insert(0, keras.Input((8,)))
    model = smp.DistributedModel.from_keras(keras.Sequential(layers))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    return model


X = np.random.default_rng(0).normal(size=(48, 8)).astype("float32")
Y = np.arange(48) % 3
BATCH = X[:16], Y[:16]


def tuned(model: Any, **arguments: Any) -> Any:
    return smp.tune(model, BATCH, **{"steps": 1, "candidates": 3, **arguments})


def state_of(model: Any) -> list[Any]:
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [np.array(variable.numpy()) for variable in variables]


def drawn() -> list[Any]:
    return [
        random.random(),
        np.random.uniform(),
        float(tf.random.uniform([])),
        float(keras.random.uniform([])),
    ]


def test_nothing_of_a_trained_model_changes():
    model = make_model()
    model.fit(X, Y, batch_size=16, verbose=0)
    before = state_of(model)
    tuned(model)
    after = state_of(model)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("lazy", [False, True])
def test_training_goes_on_as_without_it(lazy):
    results = []
    for does_tune in (False, True):
        model = make_model(lazy=lazy)
        if does_tune:
            tuned(model)
        logs = [model.fit(X, Y, batch_size=16, verbose=0, epochs=2).history]
        numbers = drawn()
        if does_tune:
            tuned(model)
        logs.append(model.fit(X, Y, batch_size=16, verbose=0).history)
        results.append((logs, numbers, drawn(), state_of(model)))
    (one_logs, one_numbers, one_later, one), (logs, numbers, later, other) = results
    assert one_logs == logs
    assert one_numbers == numbers
    assert one_later == later
    for expected, found in zip(one, other, strict=True):
        np.testing.assert_array_equal(expected, found)


def test_the_current_settings_hold_again():
    model = make_model()
    found = tuned(model)
    assert len(found.outcomes) == 4
    assert all(outcome.measured for outcome in found.outcomes), str(found)
    assert isinstance(model.plan, Plan)
    assert model.plan.settings.microbatches == 2
    assert model.plan.settings.pipeline == "interleaved"


def test_candidates_differ_and_are_predicted():
    found = tuned(make_model(), candidates=5)
    changes = [outcome.candidate.changes for outcome in found.outcomes]
    assert changes[0] == {}
    assert len({json.dumps(each, sort_keys=True) for each in changes}) == len(changes) == 6
    assert all(set(each) <= set(TUNED) for each in changes)
    predicted = [outcome.candidate.predicted_seconds for outcome in found.outcomes[1:]]
    assert all(predicted)
    assert not found.note
    # Batch normalisation of one row has no statistics.
    assert all(16 // outcome.measured.config["microbatches"] >= 2 for outcome in found.outcomes)


def test_the_best_settings_are_those_of_the_shortest_step(tmp_path):
    found = tuned(make_model())
    best = min(found.outcomes, key=lambda outcome: outcome.measured.seconds)
    assert found.seconds == best.measured.seconds
    wanted = {"partitions": 2, "microbatches": 2, "pipeline": "interleaved"}
    wanted |= {"devices": ["CPU:0", "CPU:1"], "pieces_per_partition": 1}
    assert found.config == {**wanted, **best.candidate.changes}
    found.save(tmp_path / "tuned.json")
    smp.shutdown()
    smp.init(tmp_path / "tuned.json")
    model = make_model()
    model.train_on_batch(*BATCH)
    assert model.plan.settings.microbatches == found.config["microbatches"]


def test_the_table_fits_80_columns():
    text = str(tuned(make_model()))
    assert max(map(len, text.splitlines())) <= 80
    for word in ("settings", "predicted", "measured", "as in the script", "best"):
        assert word in text


def test_a_candidate_that_fails_is_told_and_the_others_count(monkeypatch):
    model = make_model()
    train = type(model).train_on_batch

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if smp.tune.__globals__["world"].current().config.pipeline != "interleaved":
            train(self, *args, **kwargs)
            raise ValueError("no memory for this")
        return train(self, *args, **kwargs)

    before = state_of(model)
    monkeypatch.setattr(type(model), "train_on_batch", failing)
    found = tuned(model, candidates=6)
    failed = [outcome for outcome in found.outcomes if outcome.error]
    assert failed
    assert len(failed) < len(found.outcomes)
    assert "failed: ValueError: no memory for this" in str(found)
    for one, other in zip(before, state_of(model), strict=False):
        np.testing.assert_array_equal(one, other)


def test_a_model_that_cannot_be_trained_is_refused(monkeypatch):
    model = make_model()
    with pytest.raises(StepError, match="could not be trained with the current settings: failed"):
        smp.tune(model, (X[:16], Y[:15]))
    assert model.plan.settings.microbatches == 2


def test_time_is_bounded():
    found = tuned(make_model(), seconds=1e-6)
    assert [outcome.error[:9] for outcome in found.outcomes] == ["", *["not tried"] * 3]
    assert found.config["microbatches"] == 2


def test_pending_hooks_wait_for_the_program():
    model = make_model()
    called = []
    smp.register_post_partition_hook(lambda: called.append(True))
    tuned(model)
    assert not called
    model.train_on_batch(*BATCH)
    assert called == [True]


def test_all_faults_are_told_at_once():
    plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    with pytest.raises(StepError) as caught:
        smp.tune(plain, tf.data.Dataset.from_tensor_slices(BATCH), seconds=0, steps=True)
    text = str(caught.value)
    for fault in ("expected a smp.DistributedModel", "next(iter(dataset))", "seconds", "steps"):
        assert fault in text


def test_a_model_without_compile_is_refused():
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    )
    with pytest.raises(StepError, match="it is not compiled"):
        smp.tune(model, BATCH)
