"""What is computed of the values of one process, recognised in another one's graph."""

from __future__ import annotations

import tensorflow as tf

from opensmp import _private
from opensmp.execution.emission.task_graph import live_operations
from opensmp.execution.multi_process.derived_values import Derived
from opensmp.execution.multi_process.liveness import used_inputs
from opensmp.execution.multi_process.remote_values import Known


def traced(me: int, extra: bool, compute) -> tuple[Derived, list[Known], list]:
    """A program over one value of process 0 and one of process 1, as one of them traces it."""
    graph = _private.new_graph("derived")
    with graph.as_default():
        if extra:  # names of operations differ
            tf.reduce_sum(tf.square(tf.constant(1.0)))
        values = [tf.compat.v1.placeholder(tf.float32, [4, 4]) for _ in range(2)]
        outputs = list(compute(*values))
    graph.outputs = outputs
    known = [Known(("read", i, 1), i, value, f"v{i}") for i, value in enumerate(values)]
    ops = live_operations([t.op for t in outputs])
    live = {id(t): t for op in ops for t in used_inputs(op)} | {id(t): t for t in outputs}
    return Derived.of(graph, known, live, me), known, outputs


def norms(a, b):
    yield tf.sqrt(tf.reduce_sum(tf.square(a)) + tf.reduce_sum(tf.square(b)))


def test_a_number_is_received_in_place_of_what_it_is_computed_of():
    here, known, _ = traced(0, False, norms)
    (cut,) = here.cuts([known[1]])
    assert cut.values == [known[1].tensor]
    (number,) = cut.smaller
    assert number.shape == []
    there, *_ = traced(1, True, norms)
    assert here.digest(number) in there.own()
    assert there.tensor(here.digest(number)).op.type == "Sum"
    assert here.process(number) == 1
    assert here.name(number) == "v1"


def test_what_is_read_whole_is_received_whole():
    here, known, _ = traced(0, False, lambda a, b: [tf.reduce_sum(a @ b), tf.reduce_sum(b)])
    (cut,) = here.cuts([known[1]])
    assert cut.smaller == [known[1].tensor]


def test_other_programs_have_other_digests():
    programs = [
        lambda a, b: [tf.reduce_sum(b)],
        lambda a, b: [tf.reduce_max(b)],
        lambda a, b: [tf.reduce_sum(b, 0)],
        lambda a, b: [tf.reduce_sum(b, 1)],
        lambda a, b: [tf.reduce_sum(b * 2.0)],
        lambda a, b: [tf.reduce_sum(b * 3.0)],
        lambda a, b: [tf.reduce_sum(tf.transpose(b))],
        lambda a, b: [tf.reduce_sum(b * 2.0, keepdims=True)],
    ]
    digests = []
    for program in programs:
        there, _, (output,) = traced(1, False, program)
        digests.append(there.digest(output))
    assert len(set(digests)) == len(programs)


def test_random_numbers_are_no_part_of_it():
    there, _, (output,) = traced(1, False, lambda a, b: [tf.reduce_sum(b * tf.random.normal([4]))])
    assert id(output) not in there._what


def test_values_that_are_computed_with_together_are_cut_together():
    graph = _private.new_graph("pair")
    with graph.as_default():
        a, b, c = (tf.compat.v1.placeholder(tf.float32, [4]) for _ in range(3))
        outputs = [tf.reduce_sum(a * b), c * 1.0]
    graph.outputs = outputs
    known = [Known(("read", i, 1), 1, value, "v") for i, value in enumerate((a, b, c))]
    ops = live_operations([t.op for t in outputs])
    live = {id(t): t for op in ops for t in used_inputs(op)} | {id(t): t for t in outputs}
    pair, single = Derived.of(graph, known, live, 0).cuts(known)
    assert pair.values == [a, b]
    assert pair.smaller == [outputs[0]]
    assert single.smaller == [c]


def test_branches_do_not_use_all_that_they_are_given():
    def run(x, y, flag):
        def first():
            tf.square(y)  # nobody reads it
            return x * 2.0

        return tf.cond(flag, first, lambda: x)

    specs = [tf.TensorSpec([]), tf.TensorSpec([]), tf.TensorSpec([], tf.bool)]
    graph = tf.function(run, autograph=False).get_concrete_function(*specs).graph
    (branch,) = (op for op in graph.get_operations() if op.type in ("If", "StatelessIf"))
    names = [tensor.op.name for tensor in used_inputs(branch)]
    assert names == ["flag", "x"]
    assert "y" in [tensor.op.name for tensor in branch.inputs]
