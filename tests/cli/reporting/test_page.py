from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from chromium import needs_chromium, opened
from cli.reporting.made_runs import BEGIN, NAN, planned, write_run

from opensmp.cli.reporting.findings import Findings
from opensmp.cli.reporting.page import page
from opensmp.cli.reporting.run_folder import read_runs
from opensmp.compiler.plan.plan import Plan

VOID = {"meta", "link", "img", "br"}


class Parsed(HTMLParser):
    """Elements of a page, of which each end must fit its beginning."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and tag not in ("polyline", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def findings(folder, index=-1):
    run = read_runs(folder)[index]
    return Findings(run, {"net": Plan.load(run.plans[0])}, BEGIN + 1000)


def made(tmp_path, plan, **given):
    write_run(tmp_path, plan, **given)
    return page(findings(tmp_path))


def timelines(text):
    found = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return [json.loads(each) for each in found]


def test_page_has_all_that_a_report_has(tmp_path):
    parsed = Parsed(made(tmp_path, planned(2)))
    for part in (
        "Training of 'net'",
        "Bubble",
        "microbatches would give",
        "Measured: step 2",
        "Predicted by the plan",
        "Partitions",
        "Losses",
        "Time of a step",
        "Throughput",
        "Other settings, simulated",
        "Plan of 'net'",
        "Configuration",
        "Environment",
        "finished after 3 steps",
    ):
        assert part in parsed.text


def test_page_loads_nothing_from_anywhere(tmp_path):
    text = made(tmp_path, planned(2))
    for tag, attributes in Parsed(text).elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
        assert tag not in ("iframe", "object", "base", "form")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_timelines_have_each_action_once(tmp_path):
    plan = planned(3, microbatches=5)
    measured, predicted = timelines(made(tmp_path, plan))
    assert measured["rows"] == ["partition 0", "partition 1", "partition 2"]
    for data in (measured, predicted):
        names = [(kind, segment, micro) for _, _, _, kind, segment, micro in data["events"]]
        assert len(names) == len(set(names))
        assert sorted(n for n in names if n[0] == "F") == [
            ("F", segment, micro) for segment in range(3) for micro in range(5)
        ]
        assert max(end for _, _, end, *_ in data["events"]) == pytest.approx(data["seconds"])


def test_twelve_ranks_are_in_the_order_of_their_numbers(tmp_path):
    text = made(tmp_path, planned(12), ranks=12)
    assert timelines(text)[0]["rows"] == [f"partition {p}" for p in range(12)]
    table = re.search(r'<table class="partitions">.*?</table>', text, re.DOTALL)[0]
    assert re.findall(r"<td>partition (\d+)</td><td>(\d+)</td>", table) == [
        (str(p), str(p)) for p in range(12)
    ]


def test_names_with_html_in_them_are_text(tmp_path):
    plan = planned(2)
    write_run(tmp_path, plan, loss_name="<img src=x onerror=alert(1)>loss", end="E: </script><b>")
    run = read_runs(tmp_path)[0]
    found = Findings(run, {"</title><script>alert(2)</script>": plan}, BEGIN)
    text = page(found)
    parsed = Parsed(text)
    assert "<img src=x onerror=alert(1)>loss" in parsed.text
    assert "E: </script><b>" in parsed.text
    assert "<script>alert(1)</script>.py" in parsed.text
    scripts = [tag for tag, _ in parsed.elements if tag == "script"]
    assert len(scripts) == 3  # two timelines, and that of the page
    assert not any("onerror" in attributes for _, attributes in parsed.elements)


def test_losses_that_are_not_finite_are_marked(tmp_path):
    text = made(tmp_path, planned(2), losses=(3.0, NAN, 1.0, 0.5))
    assert 'class="odd"' in text
    assert "nan" not in "".join(re.findall(r'points="[^"]*"', text))


@pytest.mark.parametrize("losses", [(), (NAN,), (1.0,), (1.0, 1.0)])
def test_few_steps_are_drawn(losses, tmp_path):
    Parsed(made(tmp_path, planned(2), losses=losses, end=None))


def test_other_runs_are_listed(tmp_path):
    write_run(tmp_path, planned(2), name="20260101-000000-0000")
    write_run(tmp_path, planned(2), name="20260102-000000-0000", losses=(1.0, 0.25))
    text = page(findings(tmp_path), [findings(tmp_path, 0)])
    assert "Other runs in this folder" in text
    assert "20260101-000000-0000" in text


def test_ranks_of_several_machines_are_told_apart(tmp_path):
    text = made(tmp_path, planned(2), ranks=2, machines=("one", "two"))
    assert "clocks may differ" in text
    assert "one, two" in text


def test_a_run_without_plan_and_timeline_has_a_page(tmp_path):
    write_run(tmp_path, planned(2))
    (path,) = tmp_path.glob("*.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"timeline"' not in line]
    path.write_text("\n".join(lines) + "\n")
    found = Findings(read_runs(tmp_path)[0], {}, BEGIN, ("Plan file is broken.",))
    parsed = Parsed(page(found))
    assert "No step was measured" in parsed.text
    assert "Plan file is broken." in parsed.text


# --- in a browser ----------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_its_width_in_both_schemes(width, dark, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(made(tmp_path / "run", planned(8)))
    with opened(path, width, dark=dark) as browser:
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith(("data:", "file:"))] == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", ground)[:3]]
        assert max(levels) < 60 if dark else min(levels) > 200


@needs_chromium
def test_timelines_zoom_and_move(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(made(tmp_path / "run", planned(2)))
    box = "document.querySelector('#measured')"
    shown = f"[+{box}.dataset.from, +{box}.dataset.to]"
    press = f"{box}.querySelector('[data-action=%s]').click()"
    widest = f"Math.max(...[...{box}.querySelectorAll('rect')].map(r => +r.getAttribute('width')))"
    with opened(path) as browser:
        begin, end = browser.run(shown)
        assert begin == 0
        count = browser.run(f"{box}.querySelectorAll('rect').length")
        assert count == browser.run(
            f"JSON.parse({box}.querySelector('script').textContent).events.length"
        )
        before = browser.run(widest)
        browser.run(press % "in")
        browser.run(press % "in")
        left, right = browser.run(shown)
        assert right - left == pytest.approx((end - begin) / 4)
        assert browser.run(widest) > 1.5 * before
        assert browser.run(f"{box}.querySelectorAll('rect').length") < count
        key = "new KeyboardEvent('keydown', {key: 'ArrowRight'})"
        browser.run(f"{box}.querySelector('svg').dispatchEvent({key})")
        assert browser.run(shown)[0] == pytest.approx(left + (right - left) / 4)
        wheel = "new WheelEvent('wheel', {deltaY: -300, ctrlKey: true, clientX: 600})"
        browser.run(f"{box}.querySelector('svg').dispatchEvent({wheel})")
        closer = browser.run(shown)
        assert closer[1] - closer[0] < right - left
        browser.run(press % "all")
        assert browser.run(shown) == [begin, end]
        assert browser.problems == []


@needs_chromium
def test_what_lies_under_the_pointer_is_named(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(made(tmp_path / "run", planned(2)))
    with opened(path) as browser:
        place = browser.run(
            "(() => { const r = document.querySelector('#measured rect').getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        told = browser.run("document.querySelector('#measured .readout').textContent")
        assert told.startswith("partition 0: forward of microbatch 0, ")


@needs_chromium
def test_picture_can_be_enlarged(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(made(tmp_path / "run", planned(8)))
    width = "document.querySelector('.picture img').clientWidth"
    with opened(path, 390) as browser:
        small = browser.run(width)
        browser.run("document.querySelector('[data-full]').click()")
        assert browser.run(width) > 2 * small
        assert browser.run("document.documentElement.scrollWidth") <= 390


@needs_chromium
def test_hostile_names_run_no_script(tmp_path):
    write_run(tmp_path / "run", planned(2), loss_name="<img src=x onerror=document.title='owned'>")
    path = tmp_path / "report.html"
    path.write_text(page(findings(tmp_path / "run")))
    with opened(path) as browser:
        assert "owned" not in browser.run("document.title")
        assert browser.problems == []
