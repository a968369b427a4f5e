"""Files of schedules: edited by hand, cut short, of another program, or made to hurt."""

from __future__ import annotations

from fuzz.bounds import cases, taken
from fuzz.strategies import json_texts, json_values, mutated
from hypothesis import given
from hypothesis import strategies as st

from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.own_schedule import FORMAT
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import simulate

GRAPH = TaskGraph.chain(2, 2, split_backward=True)
ORDERS = [[str(action) for action in order] for order in build("interleaved", GRAPH).orders]
RIGHT = {"format": FORMAT, "orders": ORDERS}
DATA = mutated(st.just(RIGHT))
ODD = st.sampled_from(["0F0", "1B1", "9F9", "0F0.1", "9" * 5000 + "F0", "0F-1", "\u0660F0", ""])


def checked(what) -> None:
    result = taken(lambda: build(what, GRAPH))
    if result.error is None:
        assert len(simulate(result.value, GRAPH).end) == len(GRAPH.device)


@cases()
@given(text=json_texts(DATA))
def test_files_of_schedules_are_taken_or_refused(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    checked(str(path))


@cases()
@given(orders=st.one_of(json_values(), st.lists(st.lists(ODD)), mutated(st.just(ORDERS))))
def test_what_functions_return_is_taken_or_refused(orders):
    checked(lambda graph: orders)


@cases()
@given(rows=st.tuples(*[st.permutations(row) for row in ORDERS]))
def test_orders_that_are_shuffled_are_taken_or_refused(rows):
    checked(lambda graph: rows)
