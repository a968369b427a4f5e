from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow as tf

from opensmp.errors import StepError
from opensmp.execution.autodiff import segment_gradients  # noqa: F401 (registers a gradient)
from opensmp.execution.emission.emit_call import emit_call, has_control_flow, nested_calls


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


def test_a_call_is_one_operation_of_the_stateless_kind_on_the_current_device() -> None:
    @tf.function
    def add(x):
        tf.print("side effect", output_stream="file:///dev/null")
        return x + 1.0, x * 2.0

    function = add.get_concrete_function(tf.TensorSpec([2], tf.float32))

    @tf.function
    def run(x):
        with tf.device("CPU:2"):
            call, results = emit_call(function, [x], "my_call")
        assert call.type == "PartitionedCall"
        assert call.name == "my_call"
        assert call.device.endswith("CPU:2")
        assert [t.shape.as_list() for t in results] == [[2], [2]]
        return results

    assert [t.numpy().tolist() for t in run(tf.constant([1.0, 2.0]))] == [[2, 3], [2, 4]]


def test_captured_tensors_go_along() -> None:
    variable, constant = tf.Variable(3.0), tf.ones([100])
    function = tf.function(lambda x: x * variable + constant[0]).get_concrete_function(
        tf.TensorSpec([], tf.float32)
    )

    @tf.function
    def run(x):
        return emit_call(function, [x], "call")[1][0]

    assert float(run(tf.constant(2.0))) == 7.0


def test_a_call_without_results_has_an_operation_all_the_same() -> None:
    @tf.function
    def run():
        tf.print("nothing", output_stream="file:///dev/null")

    function = run.get_concrete_function()
    with tf.Graph().as_default():
        call, results = emit_call(function, [], "call")
    assert call.name == "call"
    assert results == []


def test_an_element_type_of_a_list_goes_along() -> None:
    function = tf.function(
        lambda: tf.raw_ops.TensorListReserve(
            element_shape=[2], num_elements=3, element_dtype=tf.float32
        )
    ).get_concrete_function()
    with tf.Graph().as_default():
        _, (elements,) = emit_call(function, [], "call")
        item = tf.raw_ops.TensorListGetItem(
            input_handle=elements, index=0, element_shape=[2], element_dtype=tf.float32
        )
        assert item.shape == (2,)


def test_the_gradient_of_a_call_itself_is_refused() -> None:
    function = tf.function(lambda x: x * x).get_concrete_function(tf.TensorSpec([], tf.float32))
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [])
        _, (y,) = emit_call(function, [x], "call")
        with pytest.raises(StepError, match="gradient of a gradient"):
            tf.gradients(y, x)


def test_one_thread_for_a_call_changes_nothing_of_its_results():
    function = tf.function(lambda x: tf.add_n([tf.sin(x * i) for i in range(6)]))
    concrete = function.get_concrete_function(tf.TensorSpec([40]))

    @tf.function
    def run(x):
        return [emit_call(concrete, [x], "call", one)[1][0] for one in (False, True)]

    many, one = run(tf.range(40, dtype=tf.float32))
    assert many.numpy().tolist() == one.numpy().tolist()
    graph = run.get_concrete_function(tf.TensorSpec([40])).graph
    calls = [op for op in graph.get_operations() if op.type == "PartitionedCall"]
    assert [op.get_attr("executor_type") for op in calls] == [b"", b"SINGLE_THREADED_EXECUTOR"]


def test_a_call_with_a_loop_in_it_keeps_its_executor():
    @tf.function
    def loop(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y + x), (0, x))[1]

    outer = tf.function(lambda x: loop(x) * 2.0)
    concrete = outer.get_concrete_function(tf.TensorSpec([]))
    assert has_control_flow(concrete)
    run = tf.function(lambda x: emit_call(concrete, [x], "call", True)[1][0])
    assert float(run(tf.constant(2.0))) == 16.0


def _units(body):
    attributes = {"_noinline": True}
    function = tf.function(body, autograph=False, experimental_attributes=attributes)
    return function.get_concrete_function(tf.TensorSpec([], tf.float32))


def test_nested_calls_are_counted_to_the_deepest() -> None:
    plain = _units(lambda x: x + 1.0)
    calls = _units(lambda x: emit_call(plain, [x], "call")[1][0] * 2.0)
    twice = _units(lambda x: emit_call(calls, [x], "call")[1][0] + plain(x))
    branches = _units(lambda x: tf.cond(x > 0.0, lambda: calls(x), lambda: x))
    loops = _units(lambda x: tf.while_loop(lambda y: y < 9.0, lambda y: [twice(y)], [x])[0])
    found = [nested_calls(each) for each in (plain, calls, twice, branches, loops)]
    assert found == [0, 1, 2, 3, 4]
