from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

from opensmp.compiler.lowering.extraction import needed
from opensmp.errors import StepError
from opensmp.execution.multi_process.placer import ANYWHERE, place_operations


class Built:
    """A small graph: a call in process 0, one in process 1, and what the test adds."""

    def __init__(self) -> None:
        self.x = tf.compat.v1.placeholder(tf.float32, [8, 4], name="x")
        self.first = tf.identity(self.x * 2.0, name="first")
        self.second = tf.tanh(self.first, name="second")
        self.owner = {self.first.op: 0, self.second.op: 1}

    def place_operations(self, *wanted: Any, **options: Any) -> Any:
        pairs = [w if isinstance(w, tuple) else (w, None) for w in wanted]
        effects = options.pop("effects", [])
        live = needed([*(t.op for t, _ in pairs), *effects], frozenset(), lambda op: True)
        options = {"num_processes": 2, "owner": self.owner, "handles": {}} | options
        return place_operations(live, wanted=pairs, **options)


@pytest.fixture
def built() -> Any:
    with tf.Graph().as_default():
        yield Built()


def texts(layout: Any) -> list[str]:
    return [str(transfer) for transfer in layout.transfers]


def test_what_every_process_has_is_computed_where_it_is_needed(built):
    layout = built.place_operations(built.second)
    assert layout.home[built.x.op] == ANYWHERE
    assert built.x.op in layout.runs[0]
    assert built.x.op not in layout.runs[1]


def test_a_value_travels_from_its_maker_to_each_reader_once(built):
    layout = built.place_operations(built.second + built.first)
    assert texts(layout)[0] == "first: float32 (8, 4) from 0 to 1"
    assert len([text for text in texts(layout) if text.startswith("first")]) == 1


def test_a_loss_is_computed_beside_the_output_and_only_the_number_travels(built):
    loss = tf.reduce_mean(tf.square(built.second - built.x), name="loss")
    layout = built.place_operations(loss)
    assert layout.home[loss.op] == 1
    assert texts(layout) == [
        "first: float32 (8, 4) from 0 to 1",
        "loss: float32 () from 1 to 0",
    ]


def test_a_result_that_one_process_keeps_does_not_travel(built):
    layout = built.place_operations((built.second, 1))
    assert texts(layout) == ["first: float32 (8, 4) from 0 to 1"]


def test_an_effect_happens_in_every_process(built):
    total = tf.reduce_sum(built.second, name="total")
    shown = tf.raw_ops.PrintV2(input=tf.strings.as_string(total, name="text"))
    layout = built.place_operations((total, 1), effects=[shown])
    assert shown in layout.runs[0]
    assert shown in layout.runs[1]
    assert "text: string () from 1 to 0" in texts(layout)


def test_one_draw_serves_all_processes(built):
    noise = tf.random.uniform([4], name="noise")
    result = tf.reduce_sum(built.second + noise)
    layout = built.place_operations((result, 1))
    draws = [op for op in layout.home if op.type == "RandomUniform"]
    assert [layout.home[op] for op in draws] == [0]


def test_reads_of_a_variable_travel_once_for_all_microbatches(built):
    handle = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4], shared_name="v")
    reads = [tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32) for _ in range(3)]
    uses = [tf.identity(read) for read in reads]
    owner = built.owner | {use.op: 1 for use in uses}
    layout = built.place_operations(
        *((use, 1) for use in uses), handles={id(reads[0].op.inputs[0]): 0}, owner=owner
    )
    (transfer,) = layout.transfers
    assert {id(t) for t in transfer.aliases} == {id(read) for read in reads}


def test_an_order_between_processes_is_a_transfer_without_a_value(built):
    first, second = tf.identity(built.x), tf.identity(built.x)
    owner = {first.op: 0, second.op: 1}
    layout = built.place_operations(
        (first, 0), (second, 1), owner=owner, orders=[(second.op, first.op)]
    )
    (transfer,) = layout.transfers
    assert transfer.tensor is None
    assert (transfer.source, transfer.target, transfer.after) == (1, 0, first.op)


def test_memory_of_one_process_cannot_travel(built):
    with tf.device("CPU:0"):
        items = tf.raw_ops.TensorListReserve(
            element_shape=[4], num_elements=2, element_dtype=tf.float32
        )
    read = tf.raw_ops.TensorListLength(input_handle=items)
    owner = {items.op: 0, read.op: 1}
    with pytest.raises(StepError, match=r"has the dtype variant"):
        built.place_operations((read, 1), owner=owner)


def test_variables_of_two_processes_cannot_be_used_in_place_by_one_operation(built):
    handles = [
        tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4], shared_name=f"v{i}") for i in range(2)
    ]
    both = tf.raw_ops.IdentityN(input=handles)
    known = {id(t): i for i, t in enumerate(both[0].op.inputs)}
    with pytest.raises(StepError, match="live in different processes"):
        built.place_operations((both[0], None), handles=known)
