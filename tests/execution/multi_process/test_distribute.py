"""Effects of the user's code in a step that several processes run."""

from __future__ import annotations

import pytest
from processes import check_ranks
from turns import in_turn

from opensmp.config.pipelines import PIPELINES


@pytest.mark.parametrize("pipeline", in_turn(sorted(PIPELINES), 3))
def test_prints_checks_and_metrics_of_a_step_run_in_several_processes(pipeline):
    results = check_ranks(
        """
        import sys
        import opensmp as smp
        smp.init()
        import keras, numpy as np, tensorflow as tf
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(3)(keras.layers.Dense(5, "relu")(inputs))
        model = smp.DistributedModel.from_keras(keras.Model(inputs, outputs))
        metric = keras.metrics.Mean()

        @smp.step
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(x, training=True) ** 2)
            tf.print("loss of", tf.shape(x)[0], "rows", output_stream=sys.stdout)
            tf.debugging.assert_all_finite(loss, "not finite")
            metric.update_state(loss)
            return tape.gradient(loss, model.trainable_variables), loss

        x = tf.constant(np.linspace(-1.0, 1.0, 32).reshape(8, 4), tf.float32)
        for _ in range(2):
            _, loss = step(x)
        np.testing.assert_allclose(float(metric.result()), float(loss.reduce_mean()), rtol=1e-6)
        """,
        2,
        {"partitions": 2, "microbatches": 4, "pipeline": pipeline},
    )
    for result in results:
        assert result.output.count("loss of 2 rows") == 8
