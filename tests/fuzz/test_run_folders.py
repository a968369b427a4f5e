"""Files of runs: cut short, edited, of another program, or made to hurt."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from cli.reporting.made_runs import BEGIN, planned, write_run
from fuzz.bounds import cases, taken
from fuzz.strategies import json_texts, mutated
from hypothesis import given, reject
from hypothesis import strategies as st

from opensmp.cli.reporting.findings import Findings
from opensmp.cli.reporting.page import page
from opensmp.cli.reporting.run_folder import read_runs

PLAN = planned(2)


def _lines() -> tuple[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), PLAN)
        (path,) = Path(folder).glob("*.jsonl")
        return path.name, path.read_text(encoding="utf-8").splitlines()


NAME, LINES = _lines()


def checked(lines: list[str], folder: Path, with_plan: bool) -> None:
    """What is taken has a page."""
    (folder / NAME).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    result = taken(lambda: read_runs(folder))
    if result.error is not None:
        return
    plans = {"net": PLAN} if with_plan else {}
    (run,) = result.value
    made: Any = taken(lambda: Findings(run, plans, BEGIN).verdict)
    assert made.error is None
    assert page(Findings(run, {}, BEGIN)).endswith("</html>\n")


@cases(one_in=2)
@given(index=st.integers(0, len(LINES) - 1), with_plan=st.booleans(), draw=st.data())
def test_values_of_a_line_are_taken_or_refused(index, with_plan, draw, tmp_path_factory):
    value = draw.draw(mutated(st.just(json.loads(LINES[index]))))
    try:
        text = json.dumps(value)
    except ValueError:  # of numbers with very many digits, which the other test has
        reject()
    checked([*LINES[:index], text, *LINES[index + 1 :]], tmp_path_factory.getbasetemp(), with_plan)


@cases(one_in=2)
@given(index=st.integers(0, len(LINES) - 1), draw=st.data())
def test_texts_of_a_line_are_taken_or_refused(index, draw, tmp_path_factory):
    text = draw.draw(json_texts(mutated(st.just(json.loads(LINES[index])))))
    checked([*LINES[:index], text, *LINES[index + 1 :]], tmp_path_factory.getbasetemp(), False)
