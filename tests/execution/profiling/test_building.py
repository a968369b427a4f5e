from __future__ import annotations

import logging
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.base import progress


@pytest.fixture
def lines(caplog):
    """The lines of level INFO."""
    with caplog.at_level(logging.INFO, logger="opensmp"):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]


@pytest.fixture
def shown(monkeypatch):
    """The texts of the status line of a terminal."""
    texts: list[str] = []

    class Line:
        def update(self, task, description):
            texts.append(description)

        def stop(self):
            texts.append("stopped")

    monkeypatch.setattr(progress, "_open", lambda: setattr(progress._state, "line", Line()))
    return texts


def network() -> keras.Model:
    layers = [keras.layers.Dense(8) for _ in range(4)]
    return smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input([8]), *layers], name="net")
    )


def test_a_plan_and_a_step_are_told_once_each(smp_init, lines):
    smp_init({"partitions": 2, "microbatches": 2})
    model = network()

    @smp.step
    def forward(x):
        return model(x)

    for rows in (4, 8, 12):
        forward(tf.ones([rows, 8]))
    tf.function(lambda: forward(tf.ones([4, 8])))()
    _, planned, built = lines()
    assert re.fullmatch(
        r"model 'net': 2 partitions planned, predicted bubble \d+ %, peak memory \S+ \w+, in \S+ s",
        planned,
    )
    assert re.fullmatch(
        r"step 'forward': built with 2 microbatches, schedule 'interleaved', in \S+ s", built
    )
    smp.shutdown()
    smp.init({"partitions": 2})
    forward(tf.ones([4, 8]))
    assert len(lines()) == 6


def test_fit_tells_of_the_train_step_only_since_others_would_tear_its_progress_bar(smp_init, lines):
    smp_init({"partitions": 2, "microbatches": 2})
    model = network()
    model.compile("sgd", "mse")
    x = np.ones([10, 8], "float32")
    model.fit(x, x, batch_size=4, epochs=2, validation_data=(x, x), verbose=0)
    model.predict(x, verbose=0)
    built = [line for line in lines() if "built" in line]
    assert len(built) == 1
    assert built[0].startswith("train step of model 'net': built with 2 microbatches")


def test_a_manual_plan_is_told_without_predictions(smp_init, lines):
    smp_init({"partitions": 2, "auto_partition": False, "default_partition": 0})
    model = network()
    model(tf.ones([2, 8]))
    assert lines()[-1].startswith("model 'net': 1 partition by hand, in ")


def test_the_status_line_shows_the_phases_in_their_order(smp_init, shown):
    smp_init({"partitions": 2, "microbatches": 3})
    model = network()

    @smp.step
    def forward(x):
        return model(x)

    forward(tf.ones([6, 8]))
    assert list(dict.fromkeys(shown)) == [
        "building step 'forward'",
        "tracing model 'net'",
        "planning 2 partitions of model 'net'",
        "building the variables of model 'net'",
        "compiling microbatch 1 of 3",
        "compiling microbatch 2 of 3",
        "compiling microbatch 3 of 3",
        "stopped",
    ]
    assert shown.count("stopped") == 1
    shown.clear()
    forward(tf.ones([6, 8]))
    assert shown == []


def test_an_error_while_a_step_is_built_ends_the_line(smp_init, shown):
    smp_init({"partitions": 2})
    model = network()

    @smp.step
    def forward(x):
        raise KeyError(model.name)

    with pytest.raises(KeyError):
        forward(tf.ones([6, 8]))
    assert shown[-1] == "stopped"
    assert progress._state.phases == []
