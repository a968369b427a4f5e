"""Canaries of function graphs and operations."""

from __future__ import annotations

import gc
import weakref

import pytest
import tensorflow as tf
from canaries import graph_with

from opensmp import _private


def test_new_graph():
    graph = _private.new_graph("mine")
    assert graph.name == "mine"
    outside = tf.constant(1.0)
    with graph.as_default():
        inside = outside + 1.0
    assert inside.graph is graph


def test_is_of_function():
    seen = {}

    def note(name, x):
        seen[name] = _private.is_of_function(tf.compat.v1.get_default_graph())
        return x

    @tf.function
    def run(x):
        x = tf.cond(x > 0.0, lambda: note("branch", x), lambda: x)
        x = tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, note("body", x)), (0, x))[1]
        return note("function", x)

    run(tf.constant(1.0))
    assert seen == {"branch": False, "body": False, "function": True}


def test_captures():
    graph = _private.new_graph("canary")
    outside = tf.constant([1.0, 2.0])
    with graph.as_default():
        y = tf.raw_ops.AddV2(x=outside, y=outside)
    ((source, placeholder),) = _private.captures(graph)
    assert source is outside
    assert all(x is placeholder for x in y.op.inputs)


def test_is_stateful():
    _, (x,) = graph_with([2])
    with x.graph.as_default():
        print_op = tf.print(x)
        total = x + 1.0
        noise = tf.raw_ops.RandomStandardNormal(shape=[2], dtype=tf.float32)
    assert _private.is_stateful(print_op)
    assert _private.is_stateful(noise.op)
    assert not _private.is_stateful(total.op)


def test_tagged():
    graph, (x,) = graph_with([2])
    with graph.as_default():
        before = x + 1.0
        with _private.tagged(graph, 2):
            outer = x + 1.0
            with _private.tagged(graph, 0):
                loop = tf.while_loop(lambda y: tf.reduce_sum(y) < 9.0, lambda y: [y + 1.0], [x])[0]
            after = x + 1.0
    while_op = next(op for op in graph.get_operations() if "While" in op.type)
    assert [_private.tag_of(op) for op in (before.op, outer.op, while_op, after.op)] == [
        None,
        2,
        0,
        2,
    ]
    assert loop.graph is graph


def test_tag_of():
    graph, (x,) = graph_with([2])
    assert _private.tag_of(x.op) is None
    with graph.as_default(), _private.tagged(graph, 3):
        assert _private.tag_of((x + 1.0).op) == 3


def test_strip_attributes():
    graph, (x,) = graph_with([2])
    with graph.as_default(), _private.tagged(graph, 1):
        y = tf.identity(x, name="y")
    node = next(node for node in graph.as_graph_def().node if node.name == y.op.name)
    assert len(node.attr) > 1
    _private.strip_attributes(node)
    assert sorted(node.attr) == ["T"]


def test_copy_handle_data():
    graph = _private.new_graph("canary")
    with graph.as_default():
        elements = tf.raw_ops.TensorListReserve(
            element_shape=[2], num_elements=3, element_dtype=tf.float32
        )
        placeholder = tf.compat.v1.placeholder(tf.variant, [])
        _private.copy_handle_data(elements, placeholder)
        _private.copy_handle_data(tf.constant(1.0), tf.constant(2.0))  # nothing to copy
        # Its gradient is dropped without a word where the element type is not known.
        item = tf.raw_ops.TensorListGetItem(
            input_handle=placeholder, index=0, element_shape=[2], element_dtype=tf.float32
        )
        (gradient,) = tf.gradients(item, placeholder)
    assert gradient is not None


def test_add_control_input():
    _, (x,) = graph_with([2])
    with x.graph.as_default():
        first, second = tf.identity(x), tf.identity(x)
    _private.add_control_input(second.op, first.op)
    assert second.op.control_inputs == [first.op]


def test_set_control_inputs():
    with tf.Graph().as_default():
        first, second, last = tf.no_op(), tf.no_op(), tf.no_op()
        _private.add_control_input(last, first)
        _private.set_control_inputs(last, [second])
        assert last.control_inputs == [second]


def test_must_run():
    """Without it nothing would run the count: it has no reader, and a call counts as stateless."""
    counted = tf.Variable(0)
    add = tf.function(lambda: counted.assign_add(1)).get_concrete_function()

    @tf.function
    def run():
        with tf.init_scope():
            function = add
        (count,) = tf.raw_ops.PartitionedCall(
            args=function.captured_inputs, Tout=[tf.int32], f=function
        )
        _private.must_run(tf.compat.v1.get_default_graph(), [count.op])
        return tf.constant(1)

    run()
    assert counted.numpy() == 1


def test_replace_input():
    _, (x, y) = graph_with([2], [2])
    with x.graph.as_default():
        total = tf.raw_ops.AddV2(x=x, y=x)
    _private.replace_input(total.op, 1, y)
    assert [t is x for t in total.op.inputs] == [True, False]
    assert total.op.inputs[1] is y


def test_automatic_control_dependencies():
    variable = tf.Variable(0.0)

    @tf.function
    def run():
        graph = tf.compat.v1.get_default_graph()
        outer = graph.experimental_acd_manager
        with _private.automatic_control_dependencies():
            assert graph.experimental_acd_manager is not outer
            for i in range(4):
                variable.assign_add(float(i))
                variable.assign(2.0 * variable)
        assert graph.experimental_acd_manager is outer
        ordered = [op for op in graph.get_operations() if op.control_inputs]
        assert len(ordered) >= 7  # known before the function itself is finished
        return variable.read_value()

    assert float(run()) == ((0.0 * 2 + 1) * 2 + 2) * 4 + 6


def test_functions_of():
    graph, (x,) = graph_with([2])
    with graph.as_default():
        tf.cond(tf.reduce_sum(x) > 0.0, lambda: x, lambda: -x)
    names = {name for node in graph.as_graph_def().node for name in _private.functions_of(node)}
    library = {function.signature.name for function in graph.as_graph_def().library.function}
    assert len(names) == 2
    assert names <= library


def test_function_graphs():
    graph, (x,) = graph_with([2])
    with graph.as_default():
        tf.cond(tf.reduce_sum(x) > 0.0, lambda: x, lambda: -x)
    branch = next(op for op in graph.get_operations() if op.type in ("If", "StatelessIf"))
    (then,) = _private.function_graphs(branch, "then_branch")
    assert any(op.type == "Placeholder" for op in then.get_operations())


def test_has_custom_gradient():
    @tf.custom_gradient
    def double(x):
        return x * 2.0, lambda upstream: upstream * 2.0

    _, (x,) = graph_with([2])
    with x.graph.as_default():
        double(x)
        plain = x * 2.0
    found = [op for op in x.graph.get_operations() if _private.has_custom_gradient(op)]
    assert [op.type for op in found] == ["IdentityN"]
    assert not _private.has_custom_gradient(plain.op)


def test_graphs_around():
    found = []

    @tf.function
    def function(x):
        found.append([graph.name for graph in _private.graphs_around()])
        return tf.cond(x > 0.0, lambda: found.append(_private.graphs_around()) or x, lambda: x)

    function(tf.constant(1.0))
    names, (branch, outermost) = found[:2]
    assert names == [outermost.name]
    assert branch.outer_graph is outermost
    assert _private.graphs_around() == []


def test_captured_from_outside():
    variable, other = tf.Variable(1.0), tf.Variable(2.0)
    found = []

    @tf.function
    def inner():
        found.append(_private.captured_from_outside())
        return other + 1.0

    @tf.function
    def outer():
        value = variable + 0.0
        return value + inner()

    assert outer().numpy() == 4.0
    assert id(variable.handle) in found[0]
    assert id(other.handle) not in found[0]


def test_is_traced_by_function():
    seen = []
    tf.function(
        lambda: seen.append(_private.is_traced_by_function(tf.compat.v1.get_default_graph())),
        autograph=False,
    )()
    assert seen == [True]
    assert not _private.is_traced_by_function(_private.new_graph("thrown_away"))


@pytest.mark.parametrize("again", [False, True])
def test_follow_traces(again):
    for _ in range(1 + again):
        _private.follow_traces()
    assert int(tf.function(lambda: tf.constant(1), autograph=False)()) == 1


def test_at_end_of_trace():
    variable, seen = tf.Variable(1.0), []

    @tf.function(autograph=False)
    def function():
        graph = tf.compat.v1.get_default_graph()
        place = tf.compat.v1.placeholder(tf.float32, [])
        result = place * 2.0

        def finish(must_run):
            seen.extend(op.type for op in must_run)
            _private.replace_input(result.op, 0, tf.constant(21.0))

        _private.at_end_of_trace(graph, finish)
        variable.assign(5.0)
        return result

    assert float(function()) == 42.0
    assert "AssignVariableOp" in seen


def test_leave_out():
    variables = [tf.Variable(0.0) for _ in range(3)]

    @tf.function(autograph=False)
    def function():
        graph = tf.compat.v1.get_default_graph()
        first, second = (v.assign_add(1.0, read_value=False) for v in variables[:2])
        variables[0].assign_add(1.0)
        _private.add_control_input(second, first)
        with tf.control_dependencies([second]):
            third = variables[2].assign(variables[0].read_value(), read_value=False)
        _private.leave_out(graph, [second])
        assert third is not None
        return tf.constant(1)

    function()
    assert [float(v) for v in variables] == [2.0, 0.0, 2.0]


def test_read_nothing():
    variable = tf.Variable([1.0, 2.0])

    @tf.function(autograph=False)
    def function():
        graph = tf.compat.v1.get_default_graph()
        value = variable.read_value()
        reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
        assert reads
        handles = [op.inputs[0] for op in reads]
        _private.read_nothing(graph, reads)
        assert all(op.inputs[0] is not old for op, old in zip(reads, handles, strict=True))
        return tf.strings.length(tf.io.serialize_tensor(value))

    full = int(tf.strings.length(tf.io.serialize_tensor(variable)))
    assert int(function()) < full  # what was read is empty


def test_note_body():
    graph = _private.new_graph("caller")
    inner = tf.function(lambda x: x + 1.0).get_concrete_function(tf.TensorSpec([]))
    _private.note_body(graph, inner)
    _private.note_body(graph, inner)
    assert list(graph._smp_bodies.values()) == [inner]


def doubled(x):
    return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, 2.0 * y), [0, x])[1]


def test_forget_bodies():
    @tf.function
    def caller(x):
        graph = tf.compat.v1.get_default_graph()
        inner = tf.function(doubled).get_concrete_function(tf.TensorSpec([]))
        references.append(weakref.ref(inner.graph))
        _private.note_body(graph, inner)
        result = tf.raw_ops.PartitionedCall(args=[x], Tout=[tf.float32], f=inner)
        _private.forget_bodies(graph)
        return result

    references = []
    called = caller.get_concrete_function(tf.TensorSpec([]))
    gc.collect()
    assert references[0]() is None
    assert float(called(tf.constant(2.0))[0]) == 16.0


@pytest.mark.parametrize("kept", [True, False])
def test_keep_functions(kept):
    @tf.function
    def copied(x):
        inner = tf.function(doubled).get_concrete_function(tf.TensorSpec([])).graph
        (result,) = inner.outputs
        if kept:
            _private.keep_functions(tf.compat.v1.get_default_graph(), [inner])
        given, wanted = {inner.inputs[0].name: x}, [result.name]
        return tf.graph_util.import_graph_def(inner.as_graph_def(), given, wanted)[0]

    called = copied.get_concrete_function(tf.TensorSpec([]))
    gc.collect()
    if kept:
        assert float(called(tf.constant(2.0))) == 16.0
    else:  # shows that it is needed
        with pytest.raises(tf.errors.OpError):
            called(tf.constant(2.0))
