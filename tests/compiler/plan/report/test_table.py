from __future__ import annotations

from dataclasses import replace

import numpy as np
from compiler.plan.hand_made import chain, plan_of
from rich.console import Console

from opensmp.compiler.plan.report.recommendation import Candidate
from opensmp.compiler.plan.report.table import (
    WIDE,
    plan_table,
    plan_text,
    recommendation_table,
    shown_layers,
)
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import Machine


def printed(table, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_each_partition_has_a_row_with_everything():
    lines = plan_text(plan_of(chain(5), [0, 0, 0, 1, 1], 2)).splitlines()
    assert lines[0] == (
        "Plan of net over 2 partitions: 4 microbatches, pipeline 'interleaved', optimize 'memory'"
    )
    rows = [", ".join(cells(line)) for line in lines if line.lstrip().startswith(("0 ", "1 "))]
    assert rows == [
        "0, dense_0, 6, 30 B, 320 B, 3 G, 3 s, 6 s, 1.5 s, 10.5 s, 100 B to 1",
        "1, dense_3, 4, 20 B, 170 B, 2 G, 2 s, 4 s, 1.5 s, 7.5 s, -",
    ]
    assert any("… dense_2 (3)" in line for line in lines)
    assert lines[-1].startswith("assumed: 50 GFLOP/s, 10 GB/s of memory bandwidth, memory without")
    assert lines[-2] == (
        "predicted step 49.5 s, peak memory 320 B, slowest stage 1.17 x the mean, bubble 27 %, "
        "200 B moved per microbatch"
    )


def test_long_names_are_not_cut_off_by_the_table():
    layers = [f"a_rather_long_name/of_a_layer_in_a_tower/number_{i}" for i in range(6)]
    text = plan_text(plan_of(chain(6, layers=layers), [0, 0, 0, 1, 1, 1], 2))
    assert all(len(line) <= WIDE for line in text.splitlines())
    assert text.count("number_") == 4
    assert "s to 1" not in text
    assert "B to 1" in text


def test_compact_table_fits_80_columns():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2, active_microbatches=4)
    lines = printed(plan_table(plan, compact=True), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "390 B" in text
    assert "FLOPs" not in text


def test_empty_partition_is_shown_as_empty():
    assert "(empty)" in plan_text(plan_of(chain(1), [0], 2))


def test_layers_are_named_by_their_first_and_last():
    assert shown_layers([]) == "(empty)"
    assert shown_layers(["a"]) == "a"
    assert shown_layers(["a", "b"]) == "a\nb"
    assert shown_layers(["a", "b", "c"]) == "a\n… c (3)"


def test_recommendation_lists_what_fits_and_what_does_not():
    plan = plan_of(chain(2), [0, 1], 2)
    settings = PlanSettings(microbatches=4, machine=Machine(memory_bytes=2**20))
    good = Candidate(2, settings, np.array([0, 1]), plan.prediction, True)
    bad = replace(good, fits=False, settings=replace(settings, pipeline="simple"))
    lines = printed(recommendation_table([good, bad], 2**20), 100)
    assert "Configurations, the best one first (1 MiB a device)" in lines[0]
    rows = [line.split() for line in lines if line.lstrip().startswith(("1 ", "2 "))]
    assert rows[0][:7] == ["1", "2", "4", "interleaved", "1", "22.5", "s"]
    assert rows[0][-1] == "yes"
    assert (rows[1][3], rows[1][-1]) == ("simple", "no")


def test_text_is_the_same_in_a_notebook_and_on_a_terminal(monkeypatch):
    plan = plan_of(chain(5), [0, 0, 0, 1, 1], 2)
    expected = str(plan)
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda *args, **kwargs: shown.append(args))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(plan) == expected
    assert "dense_3" in expected
    assert not shown


def test_a_notebook_shows_a_table_of_html():
    plan = plan_of(chain(5), [0, 0, 0, 1, 1], 2)
    made = plan._repr_html_()
    assert made.count("<tr>") == 3
    for part in ("dense_3", "<th ", ">peak memory<", "step 49.5 s", "over 2 partitions"):
        assert part in made
    assert plan.explain()._repr_html_().startswith("<pre")


def test_empty_partitions_share_a_row():
    plan = plan_of(chain(3), [0, 0, 14], 32)
    lines = printed(plan_table(plan), WIDE)
    rows = [cells(line)[:2] for line in lines if "empty" in line]
    assert rows == [["1-13", "(empty: 13 partitions)"], ["15-31", "(empty: 17 partitions)"]]
    assert len(lines) < 12
    assert plan._repr_html_().count("(empty") == 2


def test_a_single_empty_partition_has_its_own_row():
    lines = printed(plan_table(plan_of(chain(3), [0, 0, 2], 3)), WIDE)
    assert [cells(line)[:2] for line in lines if "empty" in line] == [["1", "(empty)"]]
