from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow as tf

from opensmp.runtime.calls import emit_call


@pytest.fixture
def without_graph_optimizer() -> Iterator[None]:
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def _config_of_a_call() -> tf.compat.v1.ConfigProto:
    function = tf.function(lambda x: x + 1.0).get_concrete_function(tf.TensorSpec([], tf.float32))
    with tf.Graph().as_default():
        call, results = emit_call(function, [tf.constant(1.0)], "call")
        assert results[0].op is call
        return tf.compat.v1.ConfigProto.FromString(call.get_attr("config_proto"))


def test_calls_are_optimised_by_default() -> None:
    assert not _config_of_a_call().graph_options.rewrite_options.disable_meta_optimizer


@pytest.mark.usefixtures("without_graph_optimizer")
def test_calls_carry_the_options_of_the_graph_optimizer() -> None:
    assert _config_of_a_call().graph_options.rewrite_options.disable_meta_optimizer
