from __future__ import annotations

import pytest
from compiler.plan.hand_made import chain, plan_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from opensmp.compiler.plan.report.picture import colour, draw_plan, tint
from opensmp.compiler.plan.unit_graph import CutTensor

SHAPES = {
    "one": plan_of(chain(3), [0, 0, 0], 1),
    "two": plan_of(chain(8), [0, 0, 0, 0, 1, 1, 1, 1], 2, memory_bytes=2**20),
    "empty": plan_of(chain(3), [0, 2, 2], 4, memory_bytes=1000),
    "back": plan_of(chain(4), [0, 1, 0, 1], 2),
    "no work": plan_of(chain(2, forward=[0, 0], tensors=[]), [0, 1], 2),
    "many": plan_of(chain(64), [u // 4 for u in range(64)], 16, microbatches=20),
    "skips": plan_of(
        chain(6, tensors=[CutTensor(i, tuple(range(i + 1, 6)), 9, 9) for i in range(5)]),
        [0, 0, 1, 1, 2, 2],
        3,
    ),
}


def texts(figure):
    """All text of a figure that is drawn: (text, its box in pixels)."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for axes in figure.axes
        for text in (*axes.texts, axes.title, axes._left_title, *axes.get_xticklabels())
        if text.get_text().strip()
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_plan_can_be_drawn_without_overlaps(shape):
    drawn = texts(draw_plan(SHAPES[shape]))
    overlaps = [
        (first, second)
        for i, (first, box) in enumerate(drawn)
        for second, other in drawn[i + 1 :]
        # What lies on a bar of the schedule is a number on its own, and short.
        if box.overlaps(other) and not (first.isdigit() and second.isdigit())
    ]
    assert overlaps == []


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_picture_is_written_in_the_format_of_its_suffix(suffix, start, tmp_path):
    path = tmp_path / f"plan.{suffix}"
    draw_plan(SHAPES["two"], path)
    assert path.read_bytes().startswith(start)


def test_picture_says_what_the_plan_says():
    plan = SHAPES["two"]
    words = " ".join(text for text, _ in texts(plan.plot()))
    for part in (
        "partition 0",
        "partition 1",
        "dense_3",
        "100 B",
        "Simulated schedule 'interleaved'",
    ):
        assert part in words


def test_limit_is_drawn_where_it_is_near():
    words = [text.strip() for text, _ in texts(SHAPES["empty"].plot())]
    assert "limit 1000 B" in words
    assert "limit 1 MiB" not in [text.strip() for text, _ in texts(SHAPES["two"].plot())]


def test_notebook_gets_an_image():
    figure = SHAPES["two"].plot()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_neighbouring_partitions_have_colours_that_differ_in_lightness_or_hue():
    for partition in range(16):
        left, right = to_rgb(colour(partition)), to_rgb(colour(partition + 1))
        assert sum(abs(a - b) for a, b in zip(left, right, strict=True)) > 0.3
    assert tint(0, 0.0) == (1, 1, 1)
    assert tint(0, 1.0) == pytest.approx(to_rgb(colour(0)))
