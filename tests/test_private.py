"""Canaries: one per function that rests on a private name of TensorFlow or Keras.

When a version moves or renames one, the test of that function fails, and its name says which.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import output_of
from processes import check_ranks

from opensmp import _private
from opensmp.errors import ElsewhereError
from opensmp.runtime.rendezvous import reserve_port


def graph_with(*shapes: list[int]) -> tuple[Any, list[Any]]:
    """A new function graph and placeholders in it."""
    graph = _private.new_graph("canary")
    with graph.as_default():
        return graph, [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]


def waiting_variable(**kwargs: Any) -> Any:
    """A Keras variable that has no memory yet."""
    with keras.StatelessScope(initialize_variables=False):
        return keras.Variable(keras.initializers.Constant(3.0), shape=(2,), **kwargs)


def test_every_function_has_a_canary():
    functions = {
        name
        for name, value in vars(_private).items()
        if inspect.isfunction(value)
        and value.__module__ == _private.__name__
        and not name.startswith("_")
    }
    canaries = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    missing = {f for f in functions if not any(c == f or c.startswith(f"{f}__") for c in canaries)}
    assert missing == set()


# ----------------------------------------------------------------------------------- graphs


def test_new_graph():
    graph = _private.new_graph("mine")
    assert graph.name == "mine"
    outside = tf.constant(1.0)
    with graph.as_default():
        inside = outside + 1.0
    assert inside.graph is graph


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


def test_with_autograph():
    def absolute(x):
        if x > 0.0:
            return x
        return -x

    converted = _private.with_autograph(absolute)
    run = tf.function(converted, autograph=False)
    assert [float(run(tf.constant(x))) for x in (2.0, -3.0)] == [2.0, 3.0]


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


def test_trace_apart_while(monkeypatch):
    contexts = _private.function_context
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


# ------------------------------------------------------------------------------------ tapes


def test_tape_is_active():
    assert not _private.tape_is_active()
    with tf.GradientTape() as tape:
        assert _private.tape_is_active()
        with tape.stop_recording():
            assert not _private.tape_is_active()
    assert not _private.tape_is_active()


def test_is_watched():
    x, y = tf.constant(1.0), tf.constant(1.0)
    assert not _private.is_watched(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert _private.is_watched(x)
        assert not _private.is_watched(y)


def test_stop_recording():
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with _private.stop_recording():
            hidden = x * x
        y = x * 3.0 + hidden
    assert float(tape.gradient(y, x)) == 3.0


def test_lifted():
    @tf.function
    def run(x):
        with tf.GradientTape(), _private.lifted():
            assert tf.executing_eagerly()
            inner = tf.constant(3.0)
            with tf.GradientTape() as tape:
                tape.watch(inner)
                y = inner * inner
            slope = tape.gradient(y, inner)
        return x * float(slope)

    assert float(run(tf.constant(1.0))) == 6.0


@pytest.mark.parametrize("tape", [True, False])
def test_with_gradient(tape):
    @tf.function
    def run(x):
        with tf.GradientTape() as recorder:
            recorder.watch(x)
            with _private.stop_recording():
                y, z = x * 2.0, x * 3.0
            y, z = _private.with_gradient([y, z], [x], lambda dy, dz: [10.0 * dy + dz])
            total = y + z
        return y, z, recorder.gradient(total, x) if tape else tf.gradients(total, x)[0]

    assert [float(value) for value in run(tf.constant(1.0))] == [2.0, 3.0, 11.0]


def test_is_bridge():
    with tf.Graph().as_default():
        x = tf.constant(1.0)
        (y,) = _private.with_gradient([tf.identity(x)], [x], lambda upstream: [upstream])
        assert _private.is_bridge(y.op)
        assert not _private.is_bridge(tf.identity_n([x])[0].op)


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


# -------------------------------------------------------------------------- Keras variables


def test_in_stateless_scope():
    assert not _private.in_stateless_scope()
    with keras.StatelessScope():
        assert _private.in_stateless_scope()


def test_in_symbolic_scope():
    seen = []

    class Asks(keras.layers.Layer):
        def call(self, x):
            seen.append(_private.in_symbolic_scope())
            return x

    layer = Asks()
    layer(keras.Input([2]))
    layer(tf.ones([2]))
    assert seen == [True, False]


def test_is_keras_tensor():
    assert _private.is_keras_tensor(keras.Input([2]))
    assert not _private.is_keras_tensor(tf.ones([2]))


def test_is_initialized():
    assert _private.is_initialized(keras.Variable(1.0))
    assert not _private.is_initialized(waiting_variable())
    _private.take_pending_variables()


def test_variable_dtype():
    seen = {}

    class Half(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=())

        def call(self, x):
            seen["public"], seen["stored"] = self.scale.dtype, _private.variable_dtype(self.scale)
            return x * self.scale

    Half(dtype="mixed_float16")(tf.ones([2]))
    assert seen == {"public": "float16", "stored": tf.float32}


def test_take_pending_variables():
    _private.take_pending_variables()
    first, second = waiting_variable(), waiting_variable()
    taken = _private.take_pending_variables()
    assert [id(v) for v in taken] == [id(first), id(second)]
    assert _private.take_pending_variables() == []
    keras.layers.Dense(1)(tf.ones([1, 1]))  # would initialise what it finds there
    assert not _private.is_initialized(first)


@pytest.mark.parametrize("in_function", [False, True])
def test_initialize_on(in_function):
    variable = waiting_variable()
    _private.take_pending_variables()

    def run():
        with tf.init_scope():
            _private.initialize_on(variable, "CPU:2")

    (tf.function(run) if in_function else run)()
    assert variable.value.device.endswith("CPU:2")
    assert variable.numpy().tolist() == [3.0, 3.0]


def test_storage():
    variable = keras.Variable(1.0)
    assert isinstance(_private.storage(variable), tf.Variable)
    _private.storage(variable).assign(2.0)
    assert float(variable) == 2.0


def test_move_to():
    variable = keras.Variable(np.arange(3.0), trainable=False, name="moved")
    storage = variable.value
    _private.move_to(variable, "CPU:3")
    assert variable.value is storage  # optimizers and checkpoints know it by this object
    assert variable.value.device.endswith("CPU:3")
    assert variable.numpy().tolist() == [0.0, 1.0, 2.0]
    assert variable.trainable is False
    variable.assign([1.0, 1.0, 1.0])
    assert variable.numpy().tolist() == [1.0, 1.0, 1.0]


def test_give_up():
    """No memory, an error for readers, but a place in graphs."""
    waiting, ready = keras.layers.Dense(2), keras.layers.Dense(2)
    with keras.StatelessScope(initialize_variables=False):
        waiting.build([1, 3])
    _private.take_pending_variables()
    ready.build([1, 3])
    for variable in (waiting.kernel, ready.kernel):
        _private.give_up(variable, "kernel of rank 7")
        with pytest.raises(ElsewhereError, match="kernel of rank 7 was read"):
            variable.numpy()

        read = tf.function(functools.partial(tf.convert_to_tensor, variable.value))
        assert read.get_concrete_function().outputs[0].shape == [3, 2]


def test_is_elsewhere():
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    _private.give_up(layer.kernel, "kernel")
    assert _private.is_elsewhere(layer.kernel)
    assert _private.is_elsewhere(layer.kernel.value)
    assert not _private.is_elsewhere(layer.bias)


@pytest.mark.parametrize("first", ["build", "give up"])
def test_optimizers_leave_out_what_is_elsewhere(first):
    _private.place_updates_with_variables()
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    optimizer = keras.optimizers.Adam(0.5, use_ema=True, ema_overwrite_frequency=1)
    if first == "build":
        optimizer.build(layer.trainable_variables)
    _private.give_up(layer.kernel, "kernel")
    nothing = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), [3, 2])
    optimizer.apply_gradients(zip([nothing, tf.ones([2])], layer.trainable_variables, strict=True))
    assert layer.bias.numpy().tolist() == pytest.approx([-0.5, -0.5], rel=1e-4)
    slots = [slot for slot in optimizer.variables if "kernel" in slot.path]
    assert len(slots) == 3
    assert all(map(_private.is_elsewhere, slots))
    optimizer.apply_gradients([(nothing, layer.kernel)])
    assert int(optimizer.iterations) == 2


def test_slots_move_with_their_variable():
    _private.place_updates_with_variables()
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build([variable])
    _private.move_to(variable, "CPU:1")
    assert optimizer.variables[-1].value.device.endswith("CPU:1")


def test_forget_compiled_functions():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner])
    for each in (model, inner):
        each.compile("sgd", "mse")
        each.predict(tf.ones([1, 1]), verbose=0)
        assert each.predict_function is not None
    _private.forget_compiled_functions(model)
    assert model.predict_function is inner.predict_function is None
    assert model.predict(tf.ones([1, 1]), verbose=0).shape == (1, 1)


def test_get_mask():
    embedded = keras.layers.Embedding(3, 1, mask_zero=True)(tf.constant([[1, 0]]))
    assert _private.get_mask(embedded).numpy().tolist() == [[True, False]]
    assert _private.get_mask(tf.ones([2])) is None


def test_set_mask():
    x = tf.constant([[[2.0], [4.0]]])
    _private.set_mask(x, tf.constant([[True, False]]))
    assert keras.layers.GlobalAveragePooling1D()(x).numpy().tolist() == [[2.0]]


def test_get_logits():
    logits = tf.constant([[1.0, 2.0]])
    for probabilities in (keras.activations.softmax(logits), keras.activations.sigmoid(logits)):
        assert _private.get_logits(probabilities).numpy().tolist() == [[1.0, 2.0]]
    assert _private.get_logits(tf.ones([2])) is None


def test_set_logits():
    labels, logits = tf.constant([0]), tf.constant([[-200.0, 200.0]])
    probabilities = tf.nn.softmax(logits)
    loss = keras.losses.sparse_categorical_crossentropy
    without = float(loss(labels, probabilities)[0])
    _private.set_logits(probabilities, logits)
    assert float(loss(labels, probabilities)[0]) == 400.0
    assert without < 100.0


def test_regularization_losses():
    layer = keras.layers.Dense(
        1, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(2.0)
    )
    model = keras.Sequential([layer, keras.layers.ActivityRegularization(l1=1.0)])
    model(tf.ones([1, 1]))
    assert [float(loss) for loss in _private.regularization_losses(model)] == [2.0]
    assert len(model.losses) == 2


def test_order_losses():
    first = keras.layers.ActivityRegularization(l1=1.0)
    second = keras.layers.ActivityRegularization(l1=10.0)

    class Backwards(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def call(self, x):
            return self.first(self.second(x))

    model = Backwards()
    with keras.StatelessScope(collect_losses=True) as scope:
        model(tf.ones([1, 1]))
        assert [float(loss) for loss in scope.losses] == [10.0, 1.0]
        _private.order_losses(model)
        assert [float(loss) for loss in scope.losses] == [1.0, 10.0]


def test_is_variable_creation_error():
    with pytest.raises(ValueError) as caught, keras.StatelessScope():  # noqa: PT011
        keras.Variable(np.ones(2))
    assert _private.is_variable_creation_error(caught.value)
    assert not _private.is_variable_creation_error(ValueError("something else"))


# ------------------------------------------------------------------- hooks while tracing


def test_replaced():
    class Owner:
        def name(self) -> str:
            return "own"

    def use():
        with _private.replaced(Owner, "name", lambda original: lambda self: original(self) + "!"):
            assert Owner().name() == "own!"
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert Owner().name() == "own"


def test_layer_calls():
    seen = []

    @contextlib.contextmanager
    def around(layer):
        seen.append(f"+{layer.name}")
        yield
        seen.append(f"-{layer.name}")

    inner = keras.layers.Dense(1, name="inner")
    model = keras.Sequential([inner], name="outer")
    model.build((None, 1))
    with _private.layer_calls(around):
        model(tf.ones([1, 1]))
    assert seen[0] == "+outer"
    assert seen[-1] == "-outer"
    assert seen.index("+inner") < seen.index("-inner")
    model(tf.ones([1, 1]))
    assert seen[-1] == "-outer"
    count = len(seen)
    model(tf.ones([1, 1]))
    assert len(seen) == count


def test_functional_nodes():
    shared = keras.layers.Dense(2, name="shared")
    inputs = keras.Input([2])
    middle = shared(inputs)
    model = keras.Model(inputs, shared(middle) + middle)
    seen = []

    @contextlib.contextmanager
    def around(node):
        seen.append(node)
        yield

    with _private.functional_nodes(around):
        model(tf.ones([1, 2]))
    assert [node.operation.name.split("_")[0] for node in seen] == ["shared", "shared", "add"]
    assert len(set(map(id, seen))) == 3
    assert seen[0].outputs[0] is middle


def test_new_nodes():
    made = []
    with _private.new_nodes(made.append):
        inputs = keras.Input([2])
        keras.layers.Dense(1, name="dense")(inputs)
    keras.layers.Dense(1)(inputs)
    assert [node.operation.name for node in made][-1] == "dense"


@pytest.mark.parametrize("compiled", [False, True])
def test_variable_access(compiled):
    variable = tf.Variable([1.0, 2.0])
    written = {}

    def write(which, value):
        written[id(which)] = value
        return True

    def run():
        other = tf.constant([10.0, 20.0])
        with _private.variable_access(lambda v: other if v is variable else None, write):
            results = [variable + 0.0, tf.gather(variable, 1), variable.read_value()]
            variable.assign_add([1.0, 1.0])
            results.append(written[id(variable)])
            variable.assign([5.0, 5.0])
            results.append(written[id(variable)])
            variable.assign_sub([1.0, 1.0])
            results.append(written[id(variable)])
        return results

    found = [t.numpy().tolist() for t in (tf.function(run) if compiled else run)()]
    assert found == [[10, 20], 20, [10, 20], [11, 21], [5, 5], [9, 19]]
    assert variable.numpy().tolist() == [1.0, 2.0]


def test_eager_builds():
    class Keeps(keras.layers.Layer):
        def build(self, shape):
            assert tf.executing_eagerly()
            self.kept = tf.range(float(shape[-1]))

        def call(self, x):
            return x + self.kept

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.keeps = Keeps()

        def call(self, x):
            return self.keeps(x)

    model = Outer()

    @tf.function
    def run(x):
        with _private.eager_builds():
            return model(x)

    assert run(tf.zeros([1, 3])).numpy().tolist() == [[0.0, 1.0, 2.0]]
    assert run(tf.zeros([2, 3])).shape == (2, 3)  # a second trace uses what the first one kept


# ------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
        keras.optimizers.Adam(0.1, use_ema=True, clipnorm=1.0),
        keras.optimizers.Adam(0.1, clipvalue=1.0),
        keras.optimizers.Adam(0.1, global_clipnorm=1.0),
    ],
    ids=["momentum and decay", "average and norm", "value", "global norm"],
)
def test_place_updates_with_variables(optimizer):
    _private.place_updates_with_variables()
    _private.place_updates_with_variables()  # changes nothing a second time
    variables = []
    for i in range(3):
        with tf.device(f"CPU:{i}"):
            variables.append(keras.Variable([1.0] * (i + 2)))

    @tf.function
    def run():
        gradients = []
        for i, variable in enumerate(variables):
            with tf.device(f"CPU:{i}"):
                gradients.append(2.0 * tf.identity(variable.value))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    run()
    for slot in optimizer.variables:
        if slot.shape.rank if hasattr(slot.shape, "rank") else len(slot.shape):
            assert slot.value.device.endswith(f"CPU:{slot.shape[0] - 2}"), slot.path
    for op in run.get_concrete_function().graph.get_operations():
        lengths = {t.shape[0] for t in op.outputs if t.shape.rank == 1 and t.shape[0] in (2, 3, 4)}
        if lengths and op.type in (
            "Mul",
            "AddV2",
            "Sqrt",
            "AssignVariableOp",
            "AssignSubVariableOp",
        ):
            if optimizer.global_clipnorm and not op.device:
                continue  # a norm over all gradients has no one place
            assert op.device.endswith(f"CPU:{lengths.pop() - 2}"), op.name


# ------------------------------------------------------------------------------------ costs


def test_registered_flops():
    _, (x, y) = graph_with([2, 3], [3, 4])
    with x.graph.as_default():
        product = (x @ y).op
        other = tf.reshape(x, [-1]).op
    assert _private.registered_flops(product, [[2, 3], [3, 4]], [[2, 4]]) == 2 * 2 * 3 * 4
    assert _private.registered_flops(other, [[2, 3], [1]], [[6]]) in (None, 0.0)


def test_has_registered_flops():
    assert _private.has_registered_flops("MatMul")
    assert not _private.has_registered_flops("NoSuchOperation")


# ------------------------------------------------------------------------- names elsewhere


def test_functional_is_the_class_of_functional_models():
    inputs = keras.Input([1])
    assert type(keras.Model(inputs, inputs + 1.0)) is _private.Functional


def test_autograph_lets_our_errors_pass():
    """It replaces exceptions unless they have the attribute `ag_pass_through`."""
    from opensmp.errors import StepError

    @tf.function
    def run(x):
        raise StepError("as it is")

    with pytest.raises(StepError) as caught:
        run(tf.constant(1.0))
    assert str(caught.value) == "as it is"


def test_nothing_else_in_the_package_touches_private_names():
    from pathlib import Path

    package = Path(_private.__file__).parent
    offenders = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "_private.py"
        for line in path.read_text().splitlines()
        if "tensorflow.python" in line or "keras.src" in line
    ]
    assert offenders == []
    assert isinstance(_private, types.ModuleType)


# -------------------------------------------------------------------------- several processes


def test_is_tensorflow_started():
    tf.constant(1)
    assert _private.is_tensorflow_started()
    fresh = "from opensmp import _private; print(_private.is_tensorflow_started())"
    assert output_of(fresh).splitlines()[-1] == "False"


TWO_SERVERS = """
    import os
    import pathlib
    import sys
    import time
    import tensorflow as tf
    from opensmp import _private
    rank = int(os.environ["OPENSMP_RUN_RANK"])
    folder, *ports = sys.argv[1:]
    _private.join_cluster(
        rank,
        [f"127.0.0.1:{port}" for port in ports],
        nccl=False,
        heartbeat_seconds=20,
        join_seconds=60,
    )
    with tf.device(f"/job:worker/replica:0/task:{rank}/device:CPU:0"):
        total = tf.raw_ops.CollectiveReduceV2(
            input=tf.constant([rank + 1.0]), group_size=2, group_key=1, instance_key=1,
            ordering_token=[], merge_op="Add", final_op="Id", timeout_seconds=0,
        )
    answer = _private.answers(1 - rank, 5.0)
    _private.post(f"from {rank}", f"hello-{rank}")
    heard = _private.fetch(f"from {1 - rank}")
    print(total.numpy(), answer, heard, flush=True)
    pathlib.Path(folder, str(rank)).touch()
    while not pathlib.Path(folder, str(1 - rank)).exists():  # nobody leaves before both are done
        time.sleep(0.05)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory: Any) -> Any:
    """What the ranks of a cluster of two printed."""
    folder = tmp_path_factory.mktemp("two_servers")
    with contextlib.ExitStack() as stack:
        held = [reserve_port() for _ in range(2)]
        for reservation, _ in held:
            stack.callback(reservation.close)
        results = check_ranks(TWO_SERVERS, 2, args=[folder, *(port for _, port in held)])
    return [result.lines[-1] for result in results]


def test_join_cluster(two_servers):
    assert [line.split()[0] for line in two_servers] == ["[3.]", "[3.]"]


def test_answers(two_servers):
    assert [line.split()[1] for line in two_servers] == ["True", "True"]


def test_post(two_servers):
    assert two_servers[0].split()[2] == "hello-1"


def test_fetch(two_servers):
    assert two_servers[1].split()[2] == "hello-0"


@pytest.mark.parametrize("steps", [None, 2])
def test_clip_with__optimizer_hands_over_its_gradients_and_their_places(steps):
    _private.place_updates_with_variables()
    calls = []

    def clip(gradients, places, num_all, clip_norm):
        calls.append((places, num_all, clip_norm))
        return [gradient * 0.5 for gradient in gradients]

    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=3.0, gradient_accumulation_steps=steps)
    here, unused, elsewhere = (keras.Variable([1.0, 2.0]) for _ in range(3))
    _private.give_up(elsewhere, "another rank")
    optimizer.build([here, unused, elsewhere])
    _private.clip_with(clip)
    try:
        for _ in range(steps or 1):
            gradients = [tf.constant([1.0, 1.0]), None, tf.constant([1.0, 1.0])]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras tells that a gradient is None
                optimizer.apply(gradients, [here, unused, elsewhere])
        for _ in range(steps or 1):
            optimizer.apply([tf.constant([1.0, 1.0])], [elsewhere])
    finally:
        _private.clip_with(None)
    assert calls == [([0], 2, 3.0), ([], 1, 3.0)]
    assert here.numpy().tolist() == [0.5, 1.5]


# ------------------------------------------------------------------------------ models on disk


def elsewhere() -> Any:
    """A kernel of shape (3, 2) that was given up."""
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    _private.give_up(layer.kernel, "kernel of rank 7")
    return layer.kernel


def test_lend():
    kernel = elsewhere()
    _private.lend(kernel, np.full((3, 2), 5.0, np.float32))
    assert kernel.numpy().tolist() == [[5.0, 5.0]] * 3


def test_take_back():
    kernel = elsewhere()
    _private.lend(kernel, np.zeros((3, 2), np.float32))
    _private.take_back(kernel)
    with pytest.raises(ElsewhereError, match="kernel of rank 7 was read"):
        kernel.numpy()


def test_assignments_elsewhere_ignored():
    kernel, here = elsewhere(), keras.Variable([1.0])
    with _private.assignments_elsewhere_ignored():
        kernel.assign(np.ones((3, 2)))
        here.assign([2.0])
    assert here.numpy().tolist() == [2.0]
    with pytest.raises(ElsewhereError):
        kernel.numpy()


def test_all_layers():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner])
    assert _private.all_layers(model)[0] is model
    assert inner.layers[0] in _private.all_layers(model)


# ------------------------------------------------------------------- training by Keras' trainer


def test_record_call():
    variable = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        with _private.stop_recording():
            result = 3.0 * variable
        _private.record_call([result], [variable], [], lambda upstream: [5.0 * upstream])
    np.testing.assert_array_equal(tape.gradient(result, variable), [5.0, 5.0])


def test_recording():
    x = tf.constant(2.0)
    with _private.stop_recording(), _private.recording(), tf.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    assert float(tape.gradient(y, x)) == 4.0


def compiled_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def test_compiled_loss():
    model = compiled_model()
    assert float(_private.compiled_loss(model)(np.zeros((2, 1)), np.ones((2, 1)))) == 1.0


def test_compiled_metrics():
    assert _private.compiled_metrics(compiled_model()) is not None
    assert _private.compiled_metrics(keras.Sequential()) is None


def test_build_metrics():
    model = compiled_model()
    _private.build_metrics(model, tf.zeros([2, 1]), tf.zeros([2, 1]))
    assert _private.compiled_metrics(model).built


def test_call_in_training():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5)])
    assert (np.asarray(_private.call_in_training(model, np.ones((4, 8)))) == 0.0).any()


def test_track_loss():
    model = compiled_model()
    _private.track_loss(model, tf.constant(1.0), 1)
    _private.track_loss(model, tf.constant(4.0), 2)
    assert float(model.metrics[0].result()) == 3.0


def test_rows_count():
    seen = []

    class Loss(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen.append(y_pred.shape[0])
            return y_pred[:, 0]

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", Loss())

    @tf.function
    def run(x):
        with _private.rows_count(known=False):
            unknown = _private.compiled_loss(model)(x, x)
        with _private.rows_count(known=True):
            return unknown + _private.compiled_loss(model)(x, x)

    assert float(run(tf.ones([3, 1]))) == 2.0
    assert seen == [None, 3]


def test_track():
    metric = keras.metrics.Mean()
    with _private.rows_count(known=False):
        _private.track(metric, tf.constant(1.0), 5)
        _private.track(metric, tf.constant(3.0), 1)
    assert float(metric.result()) == 2.0


def test_tracked_values():
    metric = keras.metrics.Mean()
    with _private.tracked_values([metric]) as values:
        metric.update_state(tf.constant(7.0), sample_weight=2)
    assert float(values[id(metric)]) == 7.0
    assert float(metric.result()) == 0.0


# --- checkpoints --------------------------------------------------------------


def test_checkpoint_values():
    number = tf.Variable(3.0)
    values, graph = _private.checkpoint_values(tf.train.Checkpoint(number=number))
    found = {value.key: value for value in values}
    mine = found["number/.ATTRIBUTES/VARIABLE_VALUE"]
    assert mine.owner is number
    assert float(mine.read()) == 3.0
    assert graph
    iterator = iter(tf.data.Dataset.range(3))
    values, _ = _private.checkpoint_values(tf.train.Checkpoint(data=iterator))
    assert iterator in [value.owner for value in values]


def test_checkpoint_nodes():
    _, graph = _private.checkpoint_values(tf.train.Checkpoint(number=tf.Variable(3.0)))
    nodes = _private.checkpoint_nodes(graph)
    number = nodes[nodes[0].children["number"]]
    assert list(number.keys.values()) == ["number/.ATTRIBUTES/VARIABLE_VALUE"]
    assert not number.has_registered_saver


def test_checkpoint_root():
    model = keras.Sequential([keras.layers.Dense(1)])
    step = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(model, step=step)
    root, attached = _private.checkpoint_root(checkpoint)
    assert root is model
    assert attached["step"] is step


def test_restore_where_values_are(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    here, away = keras.Variable(0.0), keras.Variable(0.0)
    _private.give_up(away, "another rank")
    tf.train.Checkpoint(a=here.value, b=_private.storage(away)).read(path)
    assert float(here.value) == 1.0
    assert _private.is_elsewhere(away)


def test_values_at_hand(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    variable = tf.Variable(0.0)
    read_before = {"a/.ATTRIBUTES/VARIABLE_VALUE": tf.constant(5.0)}
    with _private.values_at_hand(read_before):
        tf.train.Checkpoint(a=variable).read(path)
    assert float(variable) == 5.0
    assert not read_before


def test_before_late_restores(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    checkpoint = tf.train.Checkpoint(a=tf.Variable(0.0))
    seen = []
    status = checkpoint.read(path)
    _private.before_late_restores(status, lambda keys, owner: seen.append((keys, owner)))
    checkpoint.b = tf.Variable(0.0)
    assert seen == [(["b/.ATTRIBUTES/VARIABLE_VALUE"], checkpoint.b)]
    assert float(checkpoint.b) == 2.0


def test_iterator_state():
    iterator = iter(tf.data.Dataset.range(5))
    assert _private.iterator_state(iterator).dtype == tf.variant


def test_set_iterator_state():
    first, second = (iter(tf.data.Dataset.range(5)) for _ in range(2))
    next(first)
    _private.set_iterator_state(second, _private.iterator_state(first))
    assert int(next(second)) == 1


def test_track_all_variables():
    class Model(keras.Sequential):
        pass

    _private.track_all_variables(Model)
    model = Model([keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model(tf.zeros([1, 3]))
    values, _ = _private.checkpoint_values(tf.train.Checkpoint(model=model))
    assert len(values) == len(model.variables)


def test_silence_deprecations(caplog):
    with _private.silence_deprecations():
        tf.compat.v1.train.checkpoint_exists("/nothing")
    assert "deprecated" not in caplog.text


class TestPlaceUpdatesOfOtherOptimizers:
    """What `place_updates_with_variables` does to optimizers that do something of their own."""

    def test_factors_of_adafactor_are_slots(self):
        _private.place_updates_with_variables()
        with tf.device("CPU:2"):
            variable = keras.Variable(np.ones((3, 4), "float32"))
        optimizer = keras.optimizers.Adafactor()
        optimizer.build([variable])
        slots = [v for v in optimizer.variables if v.shape in ((3,), (4,), (3, 4))]
        assert len(slots) == 3
        assert {v.value.device[-5:] for v in slots} == {"CPU:2"}
        _private.give_up(variable, "another rank")
        assert all(map(_private.is_elsewhere, slots))

    def test_average_of_schedule_free_begins_at_the_weights(self):
        _private.place_updates_with_variables()
        here, away = keras.Variable(3.0), keras.Variable(4.0)
        _private.give_up(away, "another rank")
        optimizer = keras.optimizers.ScheduleFreeAdamW()
        optimizer.build([here, away])
        momenta = [v for v in optimizer.variables if "momentum" in v.path]
        assert float(momenta[0].value) == 3.0
        assert _private.is_elsewhere(momenta[1])

    def test_a_loss_is_scaled_by_the_scale_of_the_moment(self):
        _private.place_updates_with_variables()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=8.0)
        variable = keras.Variable(1.0)
        scaled = tf.function(lambda: optimizer.scale_loss(tf.constant(1.0)))
        assert float(scaled()) == 8.0
        optimizer.apply([tf.constant(np.inf)], [variable])
        assert float(scaled()) == 4.0 == float(optimizer.dynamic_scale)
        assert float(variable) == 1.0


def test_agree_on_finite_with():
    _private.place_updates_with_variables()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0)
    variable = keras.Variable(1.0)
    none_here = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), tf.constant([3, 2]))
    seen = []

    def agree(finite):
        seen.append(bool(finite))
        return tf.constant(False)

    _private.agree_on_finite_with(agree)
    try:
        optimizer.apply([tf.constant(1.0)], [variable])
        assert not optimizer.check_finite([none_here])
    finally:
        _private.agree_on_finite_with(None)
    assert seen == [True, True]
    assert float(variable) == 1.0
    assert float(optimizer.dynamic_scale) == 1.0


def test_weights_layout(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="top")])
    layout = _private.weights_layout(model)
    assert sorted((path.split("/")[-1], shape) for path, shape in layout.values()) == [
        ("bias", (2,)),
        ("kernel", (3, 2)),
    ]
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        for name, (_, shape) in layout.items():
            assert file[name].shape == shape


def test_compilation_kept(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with _private.compilation_kept(model):
        model.save(tmp_path / "model.h5")
    assert model.get_compile_config()["optimizer"]


def test_in_safe_mode():
    assert _private.in_safe_mode()
    keras.config.enable_unsafe_deserialization()
    try:
        assert not _private.in_safe_mode()
    finally:
        keras.utils.clear_session(free_memory=False)
    assert _private.in_safe_mode()


def test_inlined():
    twice = tf.function(lambda x: x + x, autograph=False)
    spec = tf.TensorSpec([2])
    outer = tf.function(lambda x: twice(x) * 3.0, input_signature=[spec], autograph=False)
    graph = outer.get_concrete_function().graph
    tensors = [*(t.name for t in graph.inputs), *(t.name for t in graph.outputs)]
    kinds = {node.op for node in _private.inlined(graph.as_graph_def(), tensors).node}
    assert {"AddV2", "Mul"} <= kinds
    assert not any(kind.endswith("PartitionedCall") for kind in kinds)


def test_global_seed():
    tf.random.set_seed(17)
    assert _private.global_seed() == 17
    tf.random.set_seed(None)
    assert _private.global_seed() is None


def test_arrays_shuffled_by():
    """In the order that Keras' trainer meets them, for both ways to shuffle."""
    seen = []
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_step = lambda data: (
        seen.append(data[0][:, 0].numpy().tolist()) or {"loss": tf.zeros([])}
    )
    x = np.arange(6.0, dtype="float32")[:, None]
    with _private.arrays_shuffled_by(lambda indices: indices[::-1]):
        model.fit(x, x, batch_size=4, verbose=0)
        model.fit(x, x, batch_size=6, verbose=0, shuffle="batch")
        tf.random.shuffle(x, seed=1)
    assert seen == [[5.0, 4.0, 3.0, 2.0], [1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    assert tf.random.shuffle.__module__.startswith("tensorflow.")


def test_overrides():
    logger = keras.callbacks.CSVLogger("there")
    assert _private.overrides(logger, "on_epoch_end")
    assert not _private.overrides(logger, "on_train_batch_end")
    each = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    assert _private.overrides(each, "on_train_batch_end")


def test_initial_epoch():
    model = compiled_model()
    assert _private.initial_epoch(model) is None


def test_set_initial_epoch():
    model = compiled_model()
    _private.set_initial_epoch(model, 2)
    history = model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=3, verbose=0)
    assert (_private.initial_epoch(model), history.epoch) == (2, [2])


def test_averages_of_own():
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    kernel, here = elsewhere(), keras.Variable([1.0])
    optimizer.build([kernel, here])
    before = list(vars(optimizer)["_model_variables_moving_average"])
    with _private.averages_of_own(keras.optimizers.LossScaleOptimizer(optimizer)):
        (average,) = vars(optimizer)["_model_variables_moving_average"]
        assert vars(optimizer)["_trainable_variables"] == [here]
        assert average is before[1]
    assert list(vars(optimizer)["_model_variables_moving_average"]) == before
