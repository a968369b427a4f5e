"""How good the plans of the partitioner are, against other ways to cut and the optimum.

    python benchmarks/partition_quality.py            # each family of models once or twice
    python benchmarks/partition_quality.py --all      # all keras.applications and backbones
    python benchmarks/partition_quality.py --quick    # a few models, less than a minute
    python benchmarks/partition_quality.py --ablate   # what each part of the partitioner is worth

Every model is traced without memory for its variables, coarsened, and cut into 2, 4 and 8
partitions by `partition_units`, by equal numbers of units, by torchgpipe's block partition,
by METIS (if `pymetis` is installed; its parts are repaired until tensors only go forward),
and by exhaustive search where the graph is small enough. All are judged by `evaluate`.

Two claims are checked, and the exit status is 1 if one fails:
- no other heuristic gives a better plan by the same rules;
- the plan is within 2 % of the optimum in at least 95 % of the cases that are solved.

The rules are `optimize` and `contiguous`. A heuristic that leaves a partition disconnected
competes where `contiguous` is off. With `optimize="memory"` a plan is better if its fullest
device is smaller by more than the 2 % that count as equal, or no larger and its step faster.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import keras
import numpy as np
import tensorflow as tf
from compiler.plan.exact import optimal_units
from keras import layers

import ablation
import baselines
from opensmp.cli.models.dry_run import build_model, dry_trace
from opensmp.compiler.plan.coarsening import units
from opensmp.compiler.plan.coarsening.coarsen import MAX_UNITS, coarsen
from opensmp.compiler.plan.cost_model import Prediction, evaluate
from opensmp.compiler.plan.partitioner.connectivity import excess_pieces
from opensmp.compiler.plan.partitioner.ideals import LatticeError, all_ideals
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE, partition_units
from opensmp.compiler.plan.partitioner.problem import price
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine

MACHINE = Machine()
MICROBATCHES = 8
SETTINGS = PlanSettings(microbatches=MICROBATCHES, machine=MACHINE)
PER_MICROBATCH = 4
SIDE = 96
RULES = (("speed", True), ("speed", False), ("memory", True), ("memory", False))
QUICK = ("DenseNet121", "MobileNetV3Small", "U-Net", "CLIPBackbone", "ResNetBackbone")
# One or two of each family of keras.applications; with these go all backbones and our own.
FAMILIES = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2"),
    *("InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small", "NASNetMobile", "ResNet50"),
    *("ResNet101V2", "VGG16", "Xception"),
)
# A few of each kind for `--ablate`; of some that take long, only the coarser graph. The first
# three show the most: large graphs with branches.
ABLATED = (
    *("NASNetMobile", "BartBackbone", "GemmaBackbone"),
    *("VGG16", "MobileNet", "DenseNet121", "InceptionResNetV2", "FalconBackbone"),
    *("ResNetBackbone", "U-Net", "Towers", "Towers, coarser", "Translator, coarser"),
    *("InceptionV3, coarser", "InceptionResNetV2, coarser", "NASNetMobile, coarser"),
    *("BartBackbone, coarser", "FalconBackbone, coarser", "MixtralBackbone, coarser"),
    *("T5Backbone, coarser", "WhisperBackbone, coarser"),
)
# Graphs with too many ideals to be solved are made this small and compared as well.
SOLVABLE = 32
ROUNDING = 1e-9
LEAST_SHARE, MOST_GAP = 0.95, 0.02


class Model(NamedTuple):
    """A model and the shapes and dtypes of the inputs of one microbatch."""

    build: Callable[[], keras.Model]
    inputs: Any


class Case(NamedTuple):
    """One model, one number of partitions, one set of rules."""

    model: str
    num_partitions: int
    optimize: str
    contiguous: bool
    ours: Prediction
    others: dict[str, Prediction]
    best: Prediction | None
    seconds: float


def images(side: int) -> tf.TensorSpec:
    return tf.TensorSpec([PER_MICROBATCH, side, side, 3], tf.float32)


def application(name: str) -> Model:
    def build() -> keras.Model:
        return getattr(keras.applications, name)(weights=None, input_shape=(SIDE, SIDE, 3))

    return Model(build, images(SIDE))


def unet() -> keras.Model:
    """Skips from the first layers to the last ones."""

    def block(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    x = inputs = keras.Input((SIDE, SIDE, 3))
    skips = []
    for filters in (32, 64, 128, 256):
        skips.append(block(x, filters))
        x = layers.MaxPooling2D()(skips[-1])
    x = block(x, 512)
    for filters, skip in zip((256, 128, 64, 32), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = block(layers.Concatenate()([x, skip]), filters)
    return keras.Model(inputs, layers.Conv2D(2, 1)(x))


def translator(words: int = 8000, width: int = 256, depth: int = 6) -> keras.Model:
    """Encoder and decoder: every decoder layer reads the encoder, the embedding is tied."""

    def dense(x: Any) -> Any:
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
        return layers.LayerNormalization()(x + y)

    def attend(x: Any, to: Any, causal: bool = False) -> Any:
        y = layers.MultiHeadAttention(4, width // 4)(x, to, use_causal_mask=causal)
        return layers.LayerNormalization()(x + y)

    source, target = keras.Input((64,), dtype="int32"), keras.Input((64,), dtype="int32")
    embedding = layers.ReversibleEmbedding(words, width)
    x, y = embedding(source), embedding(target)
    for _ in range(depth):
        x = dense(attend(x, x))
    for _ in range(depth):
        y = dense(attend(attend(y, y, causal=True), x))
    return keras.Model([source, target], embedding(y, reverse=True))


def towers(count: int = 6) -> keras.Model:
    """Towers side by side that meet at the end."""
    inputs = [keras.Input((256,)) for _ in range(count)]
    outputs = []
    for index, x in enumerate(inputs):
        for _ in range(3 + index):
            x = layers.Dense(512, activation="relu")(x)
        outputs.append(x)
    x = layers.Concatenate()(outputs)
    for _ in range(3):
        x = layers.Dense(512, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def backbones() -> dict[str, Model]:
    """The backbones of the test suite: many architectures, each very small."""
    if importlib.util.find_spec("keras_hub") is None:
        print("keras-hub is not installed: no backbones.")
        return {}
    from zoo.backbones import BACKBONES

    def specs(batch: Callable[..., Any]) -> Any:
        inputs, _ = batch(np.random.default_rng(0), PER_MICROBATCH)
        return tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), inputs)

    return {name: Model(entry.build, specs(entry.batch)) for name, entry in BACKBONES.items()}


def models() -> dict[str, Model]:
    words = tf.TensorSpec([PER_MICROBATCH, 64], tf.int32)
    rows = tf.TensorSpec([PER_MICROBATCH, 256], tf.float32)
    applications = [n for n, value in vars(keras.applications).items() if inspect.isfunction(value)]
    return {
        **{name: application(name) for name in sorted(applications)},
        **backbones(),
        "U-Net": Model(unet, images(SIDE)),
        "Translator": Model(translator, [words, words]),
        "Towers": Model(towers, [rows] * 6),
    }


def graphs_of(name: str, model: Model, ideals: int) -> dict[str, CoarseGraph]:
    """The graph of the model, and if that is too large to be solved, a coarser one."""
    traced = dry_trace(build_model(model.build, {}, name), model.inputs, training=True)
    graph = coarsen(traced, MACHINE)
    try:
        all_ideals(price(graph, 2, SETTINGS), ideals)
    except LatticeError:
        coarser = coarsen(traced, MACHINE, max_units=SOLVABLE)
        return {name: graph, f"{name}, {len(coarser)} units": coarser}
    return {name: graph}


def graphs_to_ablate(names: Sequence[str], known: Mapping[str, Model]) -> ablation.Graphs:
    """The graphs of some models, coarsened with all parts and without some; see `ablation`."""
    graphs: dict[str, dict[str, CoarseGraph]] = {part.graphs: {} for part in ablation.PARTS}
    for name in names:
        model, is_coarser = known[name.partition(",")[0]], name.endswith(", coarser")
        traced = dry_trace(build_model(model.build, {}, name), model.inputs, training=True)
        most = SOLVABLE if is_coarser else MAX_UNITS
        for kind in graphs:
            if kind == "default" or is_coarser == (kind == "runs"):
                with ablation.patched(ablation.coarsening(units, kind)):
                    graphs[kind][name] = coarsen(traced, MACHINE, max_units=most)
        keras.backend.clear_session()
    return graphs


def is_connected(graph: CoarseGraph, placed: baselines.Assignment, num_partitions: int) -> bool:
    return not excess_pieces(price(graph, num_partitions, SETTINGS), placed)


def is_better(one: Prediction, other: Prediction, optimize: str) -> bool:
    """Whether one plan is better than another one by the rule."""
    faster = one.step_seconds < other.step_seconds * (1 - ROUNDING)
    if optimize == "speed":
        return faster
    mine, yours = max(one.peak_bytes), max(other.peak_bytes)
    return mine * (1 + MEMORY_TOLERANCE) + 1 < yours or (mine <= yours and faster)


def gap(case: Case) -> float:
    """How far the plan is from the optimum, as a share of it."""
    assert case.best is not None
    step = case.ours.step_seconds / case.best.step_seconds - 1
    if case.optimize == "speed":
        return step
    # The fullest device of the optimum is at most 2 % above the least, as is ours.
    bytes_above = max(case.ours.peak_bytes) / max(case.best.peak_bytes) - 1
    return max(step, bytes_above - MEMORY_TOLERANCE)


def compare(name: str, graph: CoarseGraph, num_partitions: int, ideals: int) -> list[Case]:
    def predict(placed: baselines.Assignment) -> Prediction:
        return evaluate(graph, placed, num_partitions, SETTINGS)

    heuristics = {
        "layers": baselines.equal_layers(graph, num_partitions),
        "blocks": baselines.block_partition(graph, num_partitions, MACHINE),
        "METIS": baselines.metis(graph, num_partitions, MACHINE),
    }
    connected = {
        other: placed is not None and is_connected(graph, placed, num_partitions)
        for other, placed in heuristics.items()
    }
    cases = []
    for optimize, contiguous in RULES:
        settings = replace(SETTINGS, optimize=optimize, contiguous=contiguous)
        started = time.process_time()
        placed = partition_units(graph, num_partitions, settings)
        seconds = time.process_time() - started
        best = None
        with contextlib.suppress(LatticeError):
            best = predict(optimal_units(graph, num_partitions, settings, most_ideals=ideals))
        others = {
            other: predict(placed)
            for other, placed in heuristics.items()
            if placed is not None and (connected[other] or not contiguous)
        }
        ours = predict(placed)
        cases.append(Case(name, num_partitions, optimize, contiguous, ours, others, best, seconds))
    return cases


def row(case: Case, num_units: int) -> str:
    def against(other: str) -> str:
        if other not in case.others:
            return f"{'-':>20}"
        plan = case.others[other]
        step = plan.step_seconds / case.ours.step_seconds
        return f"{step:6.3f}x {plan.balance:5.2f} {plan.cut_bytes / 2**20:6.1f}"

    rule = f"{case.optimize[0]}{'c' if case.contiguous else ' '}"
    ours = case.ours
    best = f"{100 * gap(case):5.2f} %" if case.best else f"{'-':>7}"
    return (
        f"{case.model:28} {num_units:5} {case.num_partitions:2} {rule} | "
        f"{1e3 * ours.step_seconds:9.2f} {ours.balance:5.2f} {ours.cut_bytes / 2**20:6.1f} "
        f"{case.seconds:5.2f} | {against('layers')} | {against('blocks')} | {against('METIS')} | "
        f"{best}"
    )


HEADER = (
    f"{'':28} {'':5} {'':2} {'':2} | {'ours':^28} | {'equal layers':^20} | {'blocks':^20} | "
    f"{'METIS':^20} |\n"
    f"{'model':28} {'units':>5} {'P':>2} {'':2} | {'step ms':>9} {'max':>5} {'cut':>6} {'s':>5} | "
    f"{'step    max    cut':>20} | {'step    max    cut':>20} | {'step    max    cut':>20} | "
    "above optimum"
)
LEGEND = (
    f"{MICROBATCHES} microbatches of {PER_MICROBATCH}; s: optimize speed, m: memory, c: "
    "contiguous; max: slowest stage over mean; cut: MiB moved per microbatch; s: processor "
    "seconds of the partitioner; -: breaks the rule, or too large to be solved."
)


def summary(cases: list[Case]) -> bool:
    """Prints what became of the claims; returns whether both hold."""
    worse = [
        f"{case.model}, {case.num_partitions} partitions, {case.optimize}: {name} is better"
        for case in cases
        for name, other in case.others.items()
        if is_better(other, case.ours, case.optimize)
    ]
    compared = sum(len(case.others) for case in cases)
    solved = [case for case in cases if case.best is not None]
    close = [case for case in solved if gap(case) <= MOST_GAP]
    share = len(close) / len(solved) if solved else 0.0
    for fault in worse:
        print(fault)
    for case in solved:
        if case not in close:
            print(f"{case.model}, {case.num_partitions} partitions: {100 * gap(case):.1f} % above")
    for name in ("layers", "blocks", "METIS"):
        ratios = [
            case.others[name].step_seconds / case.ours.step_seconds
            for case in cases
            if name in case.others and case.optimize == "speed"
        ]
        if ratios:
            print(
                f"predicted step of {name}, by ours, optimize speed: geometric mean "
                f"{np.exp(np.mean(np.log(ratios))):.3f}, largest {max(ratios):.2f}"
            )
    verdict = "no" if worse else "yes"
    print(
        f"never worse than any heuristic: {verdict} ({len(worse)} of {compared} comparisons worse)"
    )
    print(f"within 2 % of the optimum: {len(close)} of {len(solved)} solved, of {len(cases)} cases")
    return not worse and share >= LEAST_SHARE


def table(cases: list[Case], units: dict[str, int]) -> str:
    """A Markdown table of the cases in which every heuristic competes for speed."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(package)}"
        for name, package in (("NumPy", "numpy"), ("Keras", "keras"), ("pymetis", "pymetis"))
        if importlib.util.find_spec(package)
    )
    lines = [
        f"{datetime.date.today().isoformat()}; Python {platform.python_version()}, TensorFlow "
        f"{tf.__version__}, {versions}.",
        "",
        "| model | units | P | step, ms | slowest / mean | cut, MiB "
        "| equal layers | blocks | METIS | above optimum |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        if case.optimize == "speed" and not case.contiguous:
            ours = case.ours
            others = [
                f"{case.others[name].step_seconds / ours.step_seconds:.3f}"
                if name in case.others
                else "-"
                for name in ("layers", "blocks", "METIS")
            ]
            above = f"{100 * gap(case):.2f} %" if case.best else "-"
            lines.append(
                f"| {case.model} | {units[case.model]} | {case.num_partitions} "
                f"| {1e3 * ours.step_seconds:.2f} | {ours.balance:.3f} "
                f"| {ours.cut_bytes / 2**20:.2f} | {' | '.join(others)} | {above} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few models, 2 and 4 partitions")
    parser.add_argument("--all", action="store_true", help="all models")
    parser.add_argument("--models", nargs="*", help="names of the models")
    parser.add_argument("--ideals", type=int, default=None, help="most ideals to search")
    parser.add_argument("--markdown", type=Path, help="file to write a table to")
    parser.add_argument(
        "--ablate",
        nargs="*",
        metavar="WORD",
        help="take away each part of the partitioner, or those whose names have one of the words",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes of --ablate")
    parser.add_argument("--seconds", type=float, default=400, help="time after which it stops")
    options = parser.parse_args()
    known = models()
    own = [name for name in known if not hasattr(keras.applications, name)]
    chosen = QUICK if options.quick else tuple(known) if options.all else (*FAMILIES, *own)
    names = options.models or [name for name in chosen if name in known]
    if options.ablate is not None:
        names = options.models or list(ABLATED)
    if unknown := [name for name in names if name.removesuffix(", coarser") not in known]:
        parser.error(f"unknown models {unknown}; there are {', '.join(known)}")
    if options.ablate is not None:
        graphs = graphs_to_ablate(names, known)
        print(ablation.table(ablation.run(graphs, options)))
        return 0
    ideals = options.ideals or (500 if options.quick else 1500)
    if baselines.pymetis is None:
        print("pymetis is not installed: no comparison with METIS.")
    print(LEGEND, HEADER, sep="\n")
    cases, sizes = [], {}
    for name in names:
        for part, graph in graphs_of(name, known[name], ideals).items():
            sizes[part] = len(graph)
            for num_partitions in (2, 4) if options.quick else (2, 4, 8):
                for case in compare(part, graph, num_partitions, ideals):
                    cases.append(case)
                    print(row(case, len(graph)), flush=True)
        keras.backend.clear_session()
    if options.markdown:
        options.markdown.write_text(table(cases, sizes), encoding="utf-8")
    return 0 if summary(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
