from __future__ import annotations

from itertools import pairwise

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


def equal(partitions, **given):
    """A chain with four layers in each partition, of which every third has a long name."""
    names = [f"encoder_block_{u}/multi_head_attention" if u % 3 else f"d{u}" for u in range(400)]
    count = 4 * partitions
    return plan_of(
        chain(count, layers=names[:count]), [u // 4 for u in range(count)], partitions, **given
    )


def boxes(figure):
    """All that is drawn and must not lie on each other: (what, its box in pixels)."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = [("title", figure._suptitle.get_window_extent(renderer))]
    for axes in figure.axes:
        labels = (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label)
        for text in (*axes.texts, axes.title, axes._left_title, *labels, axes.yaxis.label):
            if text.get_text().strip() and text.get_visible():
                box = text.get_window_extent(renderer)
                frame = text.get_bbox_patch()
                box = box if frame is None else frame.get_window_extent(renderer)
                found.append((text.get_text(), box))
        if axes.get_legend() is not None:
            found.append(("legend", axes.get_legend().get_window_extent(renderer)))
    return found


def overlaps(found):
    return [
        (first, second)
        for i, (first, box) in enumerate(found)
        for second, other in found[i + 1 :]
        if box.overlaps(other)
    ]


@pytest.mark.parametrize(
    ("partitions", "microbatches"), [(2, 12), (8, 12), (9, 4), (32, 4), (64, 4), (100, 4)]
)
def test_nothing_overlaps_with_few_and_many_partitions(partitions, microbatches):
    figure = draw_plan(equal(partitions, memory_bytes=2**12, microbatches=microbatches))
    assert overlaps(boxes(figure)) == []


@pytest.mark.parametrize("partitions", [2, 8, 32])
def test_bars_and_their_values_do_not_overlap(partitions):
    figure = draw_plan(equal(partitions))
    boxes(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes[1:3]:
        bars = {id(patch): patch.get_window_extent(renderer) for patch in axes.patches}
        values = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(values) == partitions
        assert not any(bar.overlaps(value) for bar in bars.values() for value in values)
        rows = sorted({round(bar.y0, 1) for bar in bars.values()})
        assert len(rows) == partitions
        tallest = max(bar.height for bar in bars.values())
        assert all(b - a > tallest for a, b in pairwise(rows))


@pytest.mark.parametrize("partitions", [2, 32])
def test_numbers_of_the_schedule_lie_within_their_passes(partitions):
    figure = draw_plan(equal(partitions))
    found = boxes(figure)
    assert found
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[3]
    to_pixels = axes.transData
    passes = [
        path.get_extents(to_pixels)
        for collection in axes.collections
        for path in collection.get_paths()
    ]
    assert axes.texts
    for text in axes.texts:
        box = text.get_window_extent(renderer)
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        around = [p for p in passes if p.contains(*middle)]
        assert any(p.x0 <= box.x0 and box.x1 <= p.x1 and box.height <= p.height for p in around)


def test_picture_is_no_wider_than_can_be_read():
    assert draw_plan(equal(2)).get_figwidth() == 13
    assert draw_plan(equal(32)).get_figwidth() <= 20
    assert draw_plan(equal(100)).get_figheight() < 40


def test_picture_gives_one_value_for_the_time_of_a_step():
    words = " ".join(text for text, _ in boxes(draw_plan(SHAPES["two"])))
    figure = draw_plan(SHAPES["two"])
    assert "step" not in figure._suptitle.get_text()
    assert words.count("bubble ") == 1


def test_picture_without_schedule_is_the_same_above_it():
    figure = draw_plan(SHAPES["two"], schedule=False)
    words = " ".join(text for text, _ in boxes(figure))
    assert "Simulated schedule" not in words
    assert "Memory at its peak" in words


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
