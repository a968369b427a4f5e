"""Random models in random layouts against plain Keras."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from parity.layout import Layout
from parity.random_graphs import Graph, case_of, graphs, layouts
from parity.records import compare
from parity.runs import run_plain, run_split

LASTING = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def check(graph: Graph, layout: Layout) -> None:
    case = case_of(graph)
    plain = run_plain(case, layout.microbatches)
    differences = compare(plain, run_split(case, layout))
    beyond = [str(d) for d in differences if not d.relative <= case.bound.relative]
    assert not beyond, "\n".join(beyond[:10])


@given(graphs(), layouts())
@settings(LASTING, max_examples=8)
def test_random_model_gives_the_numbers_of_plain_keras(graph: Graph, layout: Layout) -> None:
    check(graph, layout)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@given(graphs(), layouts())
@settings(LASTING, max_examples=600)
def test_many_random_models_give_the_numbers_of_plain_keras(graph: Graph, layout: Layout) -> None:
    check(graph, layout)
