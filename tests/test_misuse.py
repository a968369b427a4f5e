"""The table of misuse: what people may do wrong, and what they are told.

Every message says what happened, what was expected or received, and how to mend it; the
table holds a part of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import pytest
import tensorflow as tf
from small import TWO_BY_TWO, Net, Scale, Wrapped, batch, plain_net

import opensmp as smp
from opensmp import errors
from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.pipelines import build


class Misuse(NamedTuple):
    """One row of the table.

    Attributes:
        name: The misuse in a few words.
        do: Does it.
        error: The class of the error.
        happened: Part of the message that says what happened.
        received: Part that says what was expected or received.
        mend: Part that says how to mend it.
        config: For `smp.init` before; None leaves it out.
    """

    name: str
    do: Callable[[], Any]
    error: type[Exception]
    happened: str
    received: str
    mend: str
    config: dict[str, Any] | None = TWO_BY_TWO


# ------------------------------------------------------------------ steps and models to misuse


def step_of(function: Callable[[Any, Any], Any], **options: Any) -> Callable[[], Any]:
    """Calls, on a batch, a step whose body is `function(model, x)`."""

    def do() -> Any:
        model = Net()

        @smp.step(**options)
        def my_step(x):
            return function(model, x)

        return my_step(batch(4))

    return do


def call_of(function: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    """Calls a model whose `call(x)` is `function(self, x)`."""
    return lambda: Wrapped(function)(batch(4))


def decorate(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Decorates a function of `images` and `labels`."""

    def do() -> Any:
        @smp.step(*args, **kwargs)
        def my_step(images, labels):
            return images

        return my_step

    return do


def split(*batches: Any, **options: Any) -> Callable[[], Any]:
    """Calls a step with arguments that cannot be split as asked."""

    def do() -> Any:
        model = Net()

        @smp.step(**options)
        def my_step(images, labels=None):
            return model(images)

        return my_step(*batches)

    return do


def enter(index: Any) -> Callable[[], Any]:
    def do() -> None:
        with smp.partition(index):
            pass

    return do


def gradient(function: Callable[[], Any]) -> Any:
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(function())
    return tape.gradient(loss, [])


def step_under_tape() -> Any:
    model = Net()

    @smp.step
    def my_step(x):
        return model(x)

    return gradient(lambda: my_step(batch(4)).merge())


def step_in_step(model: Any, x: Any) -> Any:
    @smp.step
    def inner_step(x):
        return model(x)

    return inner_step(x)


def traced_then_taped() -> Any:
    model = Net()
    predict = tf.function(model)
    predict(batch(4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(predict(batch(4)))
    return tape.gradient(loss, model.trainable_variables)


def second_order_of_tf_gradients(model: Any, x: Any) -> Any:
    y = tf.reduce_sum(tf.square(model(x)))
    penalty = tf.reduce_sum(tf.square(tf.gradients(y, x)[0]))
    return y, tf.gradients(penalty, model.top.kernel.value)[0]


def in_while_loop(model: Any, x: Any) -> Any:
    y = tf.zeros([2, 3])
    for _ in tf.range(2):
        y = model(x)
    return y


def in_branch(model: Any, x: Any) -> Any:
    return tf.cond(tf.reduce_sum(x) > 0.0, lambda: model(x), lambda: model(-x))


def used_before_init() -> Any:
    @smp.step
    def my_step(x):
        return x

    return my_step(batch(4))


def called_after_shutdown() -> Any:
    model = Net(name="net")
    smp.shutdown()
    return model(batch(4))


def leaks_from_loop(model: Any, x: Any) -> Any:
    kept = []

    def body(i: Any, y: Any) -> Any:
        kept.append(y * 2.0)
        return i + 1, y

    tf.while_loop(lambda i, y: i < 2, body, [0, x])
    return kept[0]


def assigns_in_loop(model: Any, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        model.weight.assign(2.0)
        return i + 1, y

    return tf.while_loop(lambda i, y: i < 2, body, [0, x])[1]


def partition_in_loop(model: Any, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        with smp.partition(0):
            return i + 1, y * 2.0

    return tf.while_loop(lambda i, y: i < 2, body, [0, x])[1]


def output(*values: Any) -> smp.StepOutput:
    return smp.StepOutput([tf.constant(value) for value in values])


def schedule(name: str = "interleaved", active: int = 2) -> Callable[[], Any]:
    return lambda: build(name, TaskGraph.chain(2, 2), active)


CHANGING = iter(range(100))

TABLE = [
    # ------------------------------------------------------------------------- configuration
    Misuse(
        "unknown key",
        lambda: smp.init({"partition": 2}),
        errors.ConfigError,
        "this key is unknown",
        "partition (smp.init dict): received 2 (int)",
        "did you mean 'partitions'?",
        None,
    ),
    Misuse(
        "wrong type",
        lambda: smp.init({"microbatches": "many"}),
        errors.ConfigError,
        "the configuration has one fault",
        "microbatches (smp.init dict): received 'many' (str)",
        "accepted: an integer >= 1",
        None,
    ),
    Misuse(
        "several faults at once",
        lambda: smp.init({"partitions": 0, "pipeline": "simpel"}),
        errors.ConfigError,
        "the configuration has 2 faults",
        "pipeline (smp.init dict): received 'simpel' (str)",
        "did you mean 'simple'?",
        None,
    ),
    Misuse(
        "manual partitions without a default partition",
        lambda: smp.init({"partitions": 2, "auto_partition": False}),
        errors.ConfigError,
        "default_partition: not given",
        "auto_partition is False",
        '"default_partition": 0',
        None,
    ),
    Misuse(
        "more GPUs than there are",
        lambda: smp.init({"partitions": 2, "devices": "gpu"}),
        errors.ConfigError,
        "needs GPU:0, GPU:1",
        "TensorFlow sees no GPUs",
        'smp.init({"devices": "cpu", ...})',
        None,
    ),
    Misuse(
        "init twice",
        smp.init,
        errors.AlreadyInitializedError,
        "smp.init was called a second time",
        "Expected: one call per process",
        "call smp.shutdown() before the second one",
    ),
    Misuse(
        "init after TensorFlow, with too few devices",
        lambda: smp.init({"partitions": 9, "devices": "cpu"}),
        errors.AlreadyInitializedError,
        "TensorFlow was already initialised with 4 CPU devices",
        "partitions=9 need 9",
        "Call smp.init before any of them",
        None,
    ),
    # -------------------------------------------------------------------------- before init
    Misuse(
        "rank before init",
        smp.rank,
        errors.NotInitializedError,
        "smp.rank was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
        None,
    ),
    Misuse(
        "model before init",
        Net,
        errors.NotInitializedError,
        "smp.DistributedModel was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
        None,
    ),
    Misuse(
        "from_keras before init",
        lambda: smp.DistributedModel.from_keras(plain_net()),
        errors.NotInitializedError,
        "smp.DistributedModel.from_keras was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
        None,
    ),
    Misuse(
        "step before init",
        used_before_init,
        errors.NotInitializedError,
        "the smp.step function 'my_step' was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
        None,
    ),
    Misuse(
        "partition before init",
        enter(0),
        errors.NotInitializedError,
        "smp.partition was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
        None,
    ),
    Misuse(
        "model called after shutdown",
        called_after_shutdown,
        errors.NotInitializedError,
        "calling the DistributedModel 'net' was used before smp.init",
        "Received: no configuration yet",
        'smp.init({"partitions": 2, "microbatches": 4})',
    ),
    # ---------------------------------------------------------------------- decorating a step
    Misuse(
        "step of something else",
        decorate("images"),
        errors.StepError,
        "expected a function to decorate",
        "received 'images'",
        "Write @smp.step above a function",
        None,
    ),
    Misuse(
        "unknown argument of smp.step",
        decorate(non_split_input=["images"]),
        errors.StepError,
        "unknown argument 'non_split_input'",
        "accepted: non_split_inputs, input_split_axes, input_signature",
        "did you mean 'non_split_inputs'?",
        None,
    ),
    Misuse(
        "non_split_inputs is a string",
        decorate(non_split_inputs="labels"),
        errors.StepError,
        "non_split_inputs must be a list of argument names",
        "received the string 'labels'",
        "write ['labels']",
        None,
    ),
    Misuse(
        "non_split_inputs names no argument",
        decorate(non_split_inputs=["label"]),
        errors.StepError,
        "non_split_inputs names 'label'",
        "the function's arguments are ['images', 'labels']",
        "did you mean 'labels'?",
        None,
    ),
    Misuse(
        "input_split_axes names no argument",
        decorate(input_split_axes={"image": 1}),
        errors.StepError,
        "input_split_axes names 'image'",
        "the function's arguments are ['images', 'labels']",
        "did you mean 'images'?",
        None,
    ),
    Misuse(
        "input_split_axes is no dict",
        decorate(input_split_axes=["images"]),
        errors.StepError,
        "input_split_axes must be a dict",
        "received ['images']",
        'such as {"images": 1}',
        None,
    ),
    Misuse(
        "axis is no integer",
        decorate(input_split_axes={"images": "1"}),
        errors.StepError,
        "input_split_axes['images']",
        "received '1'",
        "must be an integer",
        None,
    ),
    Misuse(
        "argument both whole and split",
        decorate(non_split_inputs=["images"], input_split_axes={"images": 1}),
        errors.StepError,
        "'images' is in non_split_inputs and in input_split_axes",
        "'images'",
        "name it in one of them",
        None,
    ),
    Misuse(
        "jit_compile with several partitions",
        step_of(lambda model, x: model(x), jit_compile=True),
        errors.StepError,
        "jit_compile=True is not possible with 2 partitions",
        "XLA compiles for one device",
        "Leave jit_compile out",
    ),
    # -------------------------------------------------------------------- splitting the batch
    Misuse(
        "batch that the microbatches do not divide",
        split(batch(5), batch(7)),
        errors.StepError,
        "cannot be split into 2 microbatches",
        "argument 'images' has 5 entries along axis 0, which is not a multiple of 2",
        "Use a batch size that is a multiple of 2, change 'microbatches'",
    ),
    Misuse(
        "all such arguments at once",
        split(batch(5), batch(7)),
        errors.StepError,
        "cannot be split",
        "argument 'labels' has 7 entries along axis 0, which is not a multiple of 2",
        "smp.step(non_split_inputs=[...])",
    ),
    Misuse(
        "batch of unknown size that the microbatches do not divide",
        split(batch(5), input_signature=[tf.TensorSpec([None, 5])]),
        errors.StepError,
        "the batch cannot be split into 2 microbatches",
        "argument 'images' has 5 entries, which is not a multiple of 2",
        "Use a batch size that is a multiple of 2",
    ),
    Misuse(
        "batch of unknown rank",
        split(batch(4), input_signature=[tf.TensorSpec(None)]),
        errors.StepError,
        "cannot be split",
        "argument 'images' has an unknown rank",
        "give it a shape with set_shape or an input_signature",
    ),
    Misuse(
        "axis that is not there",
        split(batch(4), input_split_axes={"images": 2}),
        errors.StepError,
        "cannot be split",
        "argument 'images' of rank 2 has no axis 2",
        "smp.step",
    ),
    Misuse(
        "ragged tensor along another axis",
        split(tf.ragged.constant([[1.0], [2.0]]), input_split_axes={"images": 1}),
        errors.StepError,
        "cannot be split",
        "argument 'images' is ragged and can be split along axis 0 only, not 1",
        "non_split_inputs",
    ),
    Misuse(
        "output of a step with other microbatches",
        lambda: split(smp.StepOutput([batch(2), batch(2), batch(2)]))(),
        errors.StepError,
        "A StepOutput of 3 microbatches was given to an smp.step function",
        "the step has 2",
        "merge()",
    ),
    # ------------------------------------------------------------------------ inside a step
    Misuse(
        "no model in the step",
        step_of(lambda model, x: x),
        errors.StepError,
        "No DistributedModel was called",
        "must call a smp.DistributedModel and return something that depends on",
        "Call one in the function and return, for example, the loss",
    ),
    Misuse(
        "plain Keras model in the step",
        step_of(lambda model, x: plain_net()(x)),
        errors.StepError,
        "No DistributedModel was called",
        "must call a smp.DistributedModel",
        "smp.DistributedModel.from_keras",
    ),
    Misuse(
        "result that does not depend on the model",
        step_of(lambda model, x: (model(x), x)[1]),
        errors.StepError,
        "The outputs are not used",
        "must call a smp.DistributedModel and return something that depends on",
        "Return, for example, the loss",
    ),
    Misuse(
        "no result",
        step_of(lambda model, x: (model(x), None)[1]),
        errors.StepError,
        "The outputs are not used",
        "return something that depends on the model's output",
        "Return, for example, the loss",
    ),
    Misuse(
        "result that is no tensor",
        step_of(lambda model, x: (model(x), object())),
        errors.StepError,
        "of type object",
        "may return tensors, numbers, arrays and None, in lists, tuples and dicts",
        "Return the tensors of the object instead",
    ),
    Misuse(
        "results that differ between microbatches",
        step_of(lambda model, x: [model(x)] * (1 + next(CHANGING))),
        errors.StepError,
        "returned other structures for different microbatches",
        "don't have the same",
        "Return the same nest of tensors each time",
    ),
    Misuse(
        "model in a loop",
        step_of(in_while_loop),
        errors.StepError,
        "was called inside a loop body, a branch or a nested tf.function of an smp.step",
        "A pipeline must see the call",
        "loop in Python",
    ),
    Misuse(
        "model in a branch",
        step_of(in_branch),
        errors.StepError,
        "was called inside a loop body, a branch or a nested tf.function of an smp.step",
        "A pipeline must see the call",
        "call the model directly in the smp.step function",
    ),
    Misuse(
        "model in a nested tf.function",
        step_of(lambda model, x: tf.function(model)(x)),
        errors.StepError,
        "was called inside a loop body, a branch or a nested tf.function of an smp.step",
        "A pipeline must see the call",
        "take tf.function off the step function and its helpers",
    ),
    Misuse(
        "step inside a step",
        step_of(step_in_step),
        errors.StepError,
        "smp.step('inner_step') was called inside another smp.step function",
        "inside another smp.step function",
        "Call the plain function instead",
    ),
    Misuse(
        "schedule of a step that never ran",
        lambda: smp.step(lambda x: x).schedule,
        errors.StepError,
        "has no schedule yet",
        "smp.step('<lambda>')",
        "call it once",
    ),
    # --------------------------------------------------------------------------- StepOutput
    Misuse(
        "unknown method of accumulate",
        lambda: output(1.0, 2.0).accumulate("mean"),
        errors.StepError,
        "method='mean' is unknown",
        "'mean'",
        "accepted: 'variable', 'add_n', 'accumulate_n'",
        None,
    ),
    Misuse(
        "variable that does not fit",
        lambda: output(1.0, 2.0).accumulate(var=tf.Variable([1.0])),
        errors.StepError,
        "StepOutput.accumulate",
        "received shape (1,) and dtype float32",
        "must have shape () and dtype float32",
        None,
    ),
    Misuse(
        "mean of strings",
        lambda: output("a", "b").reduce_mean(),
        errors.StepError,
        "a mean of string values is not defined",
        "string",
        "use concat, merge or stack",
        None,
    ),
    Misuse(
        "sum of outputs of different shape",
        lambda: output([1.0], [1.0, 2.0]).reduce_sum(),
        errors.StepError,
        "must have one shape",
        "received (1,) and (2,)",
        "merge()",
        None,
    ),
    # ---------------------------------------------------------------------------- the model
    Misuse(
        "from_keras of a layer",
        lambda: smp.DistributedModel.from_keras(keras.layers.Dense(1)),
        errors.StepError,
        "expected a keras.Model",
        "received keras.src.layers.core.dense.Dense",
        "Wrap a layer in a model",
    ),
    Misuse(
        "model that returns a tensor of a loop body",
        call_of(leaks_from_loop),
        errors.TraceError,
        "The model returns an output",
        "made inside a loop body",
        "Return it from that body, or use a Python loop",
    ),
    Misuse(
        "model that assigns inside a loop body",
        call_of(assigns_in_loop),
        errors.TraceError,
        "is assigned inside a loop body",
        "Its new value cannot leave that body",
        "assign it afterwards",
    ),
    Misuse(
        "model under a tape outside of a step",
        lambda: gradient(lambda: Net()(batch(4))),
        errors.StepError,
        "was called under a tf.GradientTape outside of an smp.step function",
        "Gradients of a split model are taken inside a step",
        "    @smp.step\n    def forward_backward(x, y):\n        with tf.GradientTape() as tape:",
    ),
    Misuse(
        "hook with arguments",
        lambda: smp.register_post_partition_hook(lambda model: None),
        errors.StepError,
        "expected a function without arguments",
        "missing a required argument: 'model'",
        "Give its arguments default values",
        None,
    ),
    Misuse(
        "plan of a model that was never called",
        lambda: Net(name="net").plan,
        errors.PlanError,
        "model 'net' has no plan yet",
        "It is made when the model is called for the first time",
        "call it with one batch",
    ),
    # --------------------------------------------------------------------------- partitions
    Misuse(
        "partition that is not there",
        enter(2),
        errors.PartitionError,
        "smp.partition(2)",
        "there are 2 partitions, numbered 0 to 1",
        "set 'partitions' to at least 3 in smp.init",
    ),
    Misuse(
        "negative partition",
        enter(-1),
        errors.PartitionError,
        "smp.partition(-1)",
        "there are 2 partitions, numbered 0 to 1",
        "Use one of these.",
    ),
    Misuse(
        "partition by name",
        enter("first"),
        errors.PartitionError,
        "smp.partition: the index must be an integer",
        "received 'first' of type str",
        "from 0 to 1",
    ),
    Misuse(
        "partition by truth value",
        enter(True),
        errors.PartitionError,
        "smp.partition: the index must be an integer",
        "received True of type bool",
        "from 0 to 1",
    ),
    Misuse(
        "partition inside a loop body",
        call_of(partition_in_loop),
        errors.PartitionError,
        "smp.partition(0) was entered inside a loop body",
        "lies in one partition as a whole",
        "Put the smp.partition context around the loop",
    ),
    # ---------------------------------------------------------------------------- gradients
    Misuse(
        "step under a tape",
        step_under_tape,
        errors.StepError,
        "smp.step('my_step') was called under a tf.GradientTape",
        "are taken inside the smp.step function",
        "open the tape in it",
    ),
    Misuse(
        "gradient from outside of the function that called the model",
        traced_then_taped,
        tf.errors.InvalidArgumentError,
        "A derivative was asked for through a call of a DistributedModel",
        "outside of the function that made the call",
        "open the tf.GradientTape in it",
    ),
    Misuse(
        "gradient of a gradient with tf.gradients",
        step_of(second_order_of_tf_gradients),
        errors.StepError,
        "A gradient of a gradient was asked for through a DistributedModel by tf.gradients",
        "Expected: tf.GradientTape for all of them",
        "with tf.GradientTape() as outer:",
    ),
    # ---------------------------------------------------------------------------- schedules
    Misuse(
        "unknown schedule",
        schedule("interleafed"),
        errors.ScheduleError,
        "pipeline='interleafed' is not known",
        "choose one of 'simple', 'interleaved'",
        "did you mean 'interleaved'?",
        None,
    ),
    Misuse(
        "no microbatch in flight",
        schedule(active=0),
        errors.ScheduleError,
        "active_microbatches=0 is not possible",
        "the number of microbatches that may be in flight",
        "give at least 1",
        None,
    ),
    # ------------------------------------------------------------------------------- groups
    Misuse(
        "barrier of something else",
        lambda: smp.barrier("world"),
        TypeError,
        "smp.barrier: group must be a member of smp.CommGroup",
        "Received: 'world' (str)",
        "smp.WORLD",
    ),
]


@pytest.mark.parametrize("misuse", TABLE, ids=lambda misuse: misuse.name.replace(" ", "-"))
def test_the_message_says_what_happened_what_was_received_and_how_to_mend_it(smp_init, misuse):
    if misuse.config is not None:
        smp_init(misuse.config)
    with pytest.raises(misuse.error) as caught:
        misuse.do()
    message = str(caught.value)
    for part in (misuse.happened, misuse.received, misuse.mend):
        assert part in message


# These take several processes or files: tests/distributed, tests/execution, tests/cli,
# tests/api/comm/test_communication.py, tests/saving. NonFiniteError is no misuse:
# tests/execution/emission/test_finite_checks.py.
ELSEWHERE = {
    errors.LaunchError,
    errors.CommunicationError,
    errors.ElsewhereError,
    errors.CheckpointError,
    errors.SavingError,
    errors.NonFiniteError,
}


def test_every_error_of_ours_is_in_the_table():
    ours = {e for e in vars(errors).values() if isinstance(e, type) and e is not errors.SmpError}
    assert ours - {m.error for m in TABLE} == ELSEWHERE


# Faults found in the middle of a trace, where something could stay behind.
IN_A_TRACE = [
    m
    for m in TABLE
    if m.name
    in {
        "all such arguments at once",
        "result that does not depend on the model",
        "model in a nested tf.function",
        "model that assigns inside a loop body",
        "model under a tape outside of a step",
        "partition inside a loop body",
        "step inside a step",
        "gradient of a gradient with tf.gradients",
    }
]


@pytest.mark.parametrize("misuse", IN_A_TRACE, ids=lambda misuse: misuse.name.replace(" ", "-"))
def test_the_error_is_the_same_in_a_tf_function(smp_init, misuse):
    smp_init(misuse.config)
    with pytest.raises(misuse.error) as caught:
        tf.function(misuse.do)()
    assert misuse.mend in str(caught.value)


def test_after_a_fault_the_same_program_goes_on(smp_init):
    smp_init(TWO_BY_TWO)
    for misuse in IN_A_TRACE:
        with pytest.raises(misuse.error):
            misuse.do()
    model = Scale(3.0)

    @smp.step
    def my_step(x):
        with tf.GradientTape() as tape:
            y = model(x)
        return y, tape.gradient(y, model.factor)

    y, slope = my_step(tf.constant([1.0, 2.0]))
    assert y.merge().numpy().tolist() == [3.0, 6.0]
    assert slope.merge().numpy().tolist() == [1.0, 2.0]
