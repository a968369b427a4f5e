"""Canaries of traces of `tf.function`."""

from __future__ import annotations

import functools

import tensorflow as tf

from opensmp import _private


def test_call_attributes():
    assert "config_proto" in _private.call_attributes()
    # Sums of many are what the memory optimizer would make temporary variables for.
    function = tf.function(lambda x: tf.add_n([x * float(i) for i in range(8)]) + 1.0)
    concrete = function.get_concrete_function(tf.TensorSpec([1000, 1000]))

    def run(x, one_thread):
        attributes = _private.call_attributes(one_thread)
        return tf.raw_ops.PartitionedCall(args=[x], Tout=[tf.float32], f=concrete, **attributes)

    for one_thread in (False, True):
        call = tf.function(functools.partial(run, one_thread=one_thread))
        assert float(call(tf.ones([1000, 1000]))[0][0, 0]) == 29.0


def test_called_functions_are_optimized_once_unless_the_program_says_otherwise():
    def iterations():
        config = tf.compat.v1.ConfigProto.FromString(_private.call_attributes()["config_proto"])
        return config.graph_options.rewrite_options.meta_optimizer_iterations

    assert iterations() == 1
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        config = tf.compat.v1.ConfigProto.FromString(_private.call_attributes()["config_proto"])
        assert config.graph_options.rewrite_options.disable_meta_optimizer
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def test_with_autograph():
    def absolute(x):
        if x > 0.0:
            return x
        return -x

    converted = _private.with_autograph(absolute)
    run = tf.function(converted, autograph=False)
    assert [float(run(tf.constant(x))) for x in (2.0, -3.0)] == [2.0, 3.0]


def test_trace_apart_while(monkeypatch):
    contexts = _private.tensorflow.tracing.function_context
    monkeypatch.setattr(contexts, "make_function_context", contexts.make_function_context)
    state = {"apart": False}
    _private.trace_apart_while(lambda: state["apart"])
    traces = []

    @tf.function
    def run(x):
        traces.append(state["apart"])
        return x

    for apart in (False, True, False, True):
        state["apart"] = apart
        run(tf.constant(1.0))
    assert traces == [False, True]


def test_hand_out_results():
    @tf.function
    def run(x):
        results = []
        for i in range(3):
            with tf.device(f"CPU:{i}"):
                results.append(x + float(i))
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        return results

    outputs = run.get_concrete_function(tf.constant(1.0)).outputs
    assert [t.op.type for t in outputs] == ["Identity"] * 3
    assert [t.device[-1] for t in outputs] == ["0", "1", "2"]
    results = run(tf.constant(1.0))
    assert [t.backing_device[-1] for t in results] == ["0", "1", "2"]
    assert [float(t) for t in results] == [1.0, 2.0, 3.0]


def test_results_that_are_handed_out_do_not_wait_for_effects():
    done = tf.Variable(0.0)

    @tf.function
    def run(x):
        result = 2.0 * x
        done.assign_add(x)
        _private.hand_out_results(tf.compat.v1.get_default_graph())
        return result

    @tf.function
    def around(x):
        return run(x) + 1.0, done.read_value()

    graph = run.get_concrete_function(tf.constant(1.0)).graph
    assert graph.outputs[0].op.control_inputs == []
    assert [op.type for op in graph.control_outputs].count("AssignAddVariableOp") == 1
    assert [float(t) for t in around(tf.constant(3.0))] == [7.0, 3.0]
    assert float(run(tf.constant(1.0))) == 2.0
    assert float(done) == 4.0


def test_unspecialized():
    def body(x):
        return [x + 1.0, tf.reduce_sum(x)]

    with _private.unspecialized() as attributes:
        function = tf.function(body, experimental_attributes={"_noinline": True, **attributes})
        concrete = function.get_concrete_function(tf.TensorSpec([2]))
    assert concrete.function_def.attr["_nospecialize"].b
    call = tf.function(lambda x: concrete(x)[1])
    assert float(call(tf.ones([2]))) == 2.0


def test_unordered():
    counter = tf.Variable(0)

    def body(x):
        counter.assign_add(1)
        return x + 1.0

    function = tf.function(body, autograph=False, experimental_attributes=_private.UNORDERED)
    graph = function.get_concrete_function(tf.TensorSpec([2])).graph
    assert graph.control_outputs == []
    assert graph.outputs[0].op.type == "AddV2"  # not an identity that waits for the assignment


def test_variant_of():
    def body(x):
        return x * 2.0 + weight

    weight = tf.constant([1.0, 2.0])
    attributes = {"_noinline": True}
    function = tf.function(body, autograph=False, experimental_attributes=attributes)
    concrete = function.get_concrete_function(tf.TensorSpec([2]))
    variant = _private.variant_of(concrete, {})
    assert concrete.function_def.attr["_noinline"].b
    assert "_noinline" not in variant.function_def.attr
    assert variant.name != concrete.name
    del function, concrete
    assert variant(tf.ones([2])).numpy().tolist() == [3.0, 4.0]
