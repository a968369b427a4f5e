from __future__ import annotations

import ast
from pathlib import Path

import pytest

from opensmp.compiler.schedule import pipelines as package
from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.interleaved import interleaved
from opensmp.compiler.schedule.pipelines import BUILDERS, build
from opensmp.compiler.schedule.simple import simple
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError


def test_pipelines_are_built_by_name() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    assert tuple(BUILDERS) == ("simple", "interleaved", "zero_bubble")
    assert build("simple", graph, active_microbatches=2) == simple(graph)
    assert build("interleaved", graph, active_microbatches=2) == interleaved(graph, 2)


def test_unknown_pipeline_is_refused_with_the_nearest_name() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError) as error:
        build("interleave", graph, active_microbatches=1)
    assert str(error.value) == (
        "Schedule: pipeline='interleave' is not known; choose one of 'simple', 'interleaved', "
        "'zero_bubble'; did you mean 'interleaved'?"
    )
    with pytest.raises(ScheduleError, match=r"choose one of .*, 'zero_bubble'\.$"):
        build("gpipe", graph, active_microbatches=1)


def test_built_schedule_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    monkeypatch.setattr(
        package, "BUILDERS", {"empty": lambda graph, bound: Schedule("empty", ((),))}
    )
    with pytest.raises(ScheduleError, match="missing: 0B0 is in no order"):
        build("empty", graph, active_microbatches=1)


def test_schedules_know_nothing_of_tensorflow() -> None:
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & {"tensorflow", "keras"}, path


def test_every_module_with_a_schedule_has_a_row() -> None:
    written = {
        path.stem
        for path in Path(package.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == path.stem
        if node.returns is not None and ast.unparse(node.returns) == "Schedule"
    }
    assert written == PIPELINES.keys()


def test_row_without_a_module_is_told() -> None:
    with pytest.raises(ImportError, match=r"has a row 'gpipe'\. Expected: the module .*gpipe, and"):
        package._builder("gpipe")
