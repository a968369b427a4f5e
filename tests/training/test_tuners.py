"""The recipes of docs/tracking.md, where these libraries are installed."""

from __future__ import annotations

import pytest
from helpers import output_of
from processes import run_ranks

DATA = """
import keras, numpy as np
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2})
x, y = np.ones((32, 20), "float32"), np.arange(32) % 3
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

def compiled(units, rate):
    inputs = keras.Input((20,))
    hidden = keras.layers.Dense(units, "relu")(inputs)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(3)(hidden)))
    model.compile(keras.optimizers.Adam(rate), loss)
    return model
"""

KERAS_TUNER = """
import keras_tuner

def build(hp):
    rate = hp.Float("rate", 1e-4, 1e-2, sampling="log")
    return compiled(hp.Int("units", 32, 512, step=32), rate)

tuner = keras_tuner.RandomSearch(build, objective="val_loss", max_trials=3, directory={folder!r})
tuner.search(x, y, validation_data=(x, y), batch_size=16, verbose=0)
trials = tuner.oracle.get_best_trials(3)
print(len({{str(trial.hyperparameters.values) for trial in trials}}))
print(isinstance(tuner.get_best_models(1)[0], smp.DistributedModel))
"""

OPTUNA = """
import optuna

study = optuna.create_study() if smp.rank() == 0 else None
rates = []
for number in range(2):
    if smp.rank() == 0:
        trial = study.ask()
        rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
        smp.broadcast(rate, smp.WORLD)
    else:
        rate = smp.recv_from(0, smp.RankType.WORLD_RANK)
    rates.append(rate)
    history = compiled(8, rate).fit(x, y, batch_size=16, verbose=0).history
    if smp.rank() == 0:
        study.tell(trial, history["loss"][-1])
assert all(each == rates for each in smp.allgather(rates))
print("trials", len(study.trials) if study else 0)
"""


def test_keras_tuner(tmp_path):
    pytest.importorskip("keras_tuner", reason="KerasTuner is not installed")
    out = output_of(DATA + KERAS_TUNER.format(folder=str(tmp_path)))
    assert out.splitlines()[-2:] == ["3", "True"]


def test_optuna_in_two_processes():
    pytest.importorskip("optuna", reason="Optuna is not installed")
    first, other = run_ranks(DATA + OPTUNA, 2)
    assert (first.code, other.code) == (0, 0), first.output + other.output
    assert first.lines[-1] == "trials 2"
    assert other.lines[-1] == "trials 0"
