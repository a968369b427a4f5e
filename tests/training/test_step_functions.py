"""What `fit` calls is traced no more often than it must be, and nothing warns of it."""

from __future__ import annotations

import logging

from training.fixtures import BY_TWO, classifier, data

import opensmp as smp


def test_batches_of_many_sizes_make_tensorflow_warn_of_nothing(smp_init, caplog):
    smp_init(BY_TWO)
    model = smp.DistributedModel.from_keras(classifier())
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = data(22)
    with caplog.at_level(logging.WARNING):
        for rows in (2, 3, 4, 5, 6, 7):
            model.predict(x[:rows], verbose=0)
            model.test_on_batch(x[:rows], y[:rows])
    assert "retracing" not in caplog.text
