"""Simulated steps beside published ones, and beside steps that were measured here.

    python benchmarks/simulation.py             # the tables of three papers, under a minute
    python benchmarks/simulation.py --quick     # their smallest rows, a few seconds
    python benchmarks/simulation.py --measure   # steps of two ranks on this machine, minutes

Published numbers, as far as a source of them was found:

- Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): tables 3, 4, 5 and 9, from a
  text of the paper.
- Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
  Megatron-LM" (arXiv 2104.04473): table 1, from the picture `images/cases_april2021.png` in the
  history of Megatron-LM's repository, and `examples/sc21/run_table_1.sh` there for how it was run.
- Qi et al., "Pipeline Parallelism with Controllable Memory" (arXiv 2405.15362): of table 4 one
  column, of figure 7 two plots whose values are read off, and table 2, from notes of a reader of
  the paper; the paper's own tables were not at hand, so that the rest is left out.

What the simulation has from these papers are three numbers: the share of an A100's peak that
products reach and the traffic of a pass, fitted to table 9 of the first one.

Prediction, written before the first comparison: the order of the schedules as published in every
column, gains over 1F1B within 5 points; of Megatron's table the share of the peak within 5 points.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import simulated_here
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.segments import Segments, segments_of
from opensmp.compiler.simulation.simulate import (
    layout_of,
    machine_for,
    simulate_transformer,
    time_of,
)
from opensmp.compiler.simulation.timing import Timing, time_chain
from opensmp.compiler.simulation.transformer import Transformer

A100 = Cluster(4, 8, "a100", between="infiniband-hdr")
SELENE = Cluster(384, 8, "a100", between="infiniband-hdr")
MEGATRON_LM: Mapping[str, Any] = {"split_backward": False, "blocking_transfers": True}
"""Its 1F1B computes backward passes as a whole, and waits while it sends."""


class Qi(NamedTuple):
    """A model of the zero-bubble paper: tables 3, 4, 5 and 9, by the number of microbatches."""

    layers: int
    heads: int
    width: int
    stages: int
    examples: int
    throughput: Mapping[int, tuple[float, float, float, float]]  # ZB-2p, ZB-1p, 1F1B, 1F1B-I
    gigabytes: tuple[float, float, float, float]
    bubbles: Mapping[int, tuple[float, float, float]]  # 1F1B, 1F1B-I, ZB-H1
    milliseconds: Mapping[int, tuple[float, float, float, float]]  # F, B, W, transfer

    @property
    def pieces(self) -> int:
        """Layers of a stage: the most pieces, as the paper has them."""
        return (self.layers + 2) // self.stages

    @property
    def transformer(self) -> Transformer:
        return Transformer(
            self.layers,
            self.width,
            self.heads,
            1024,
            50304,
            fused_attention=False,
            dropout=True,
            precision="float16",
        )


QI = {
    "1.5B": Qi(
        22, 24, 2304, 8, 6,
        {24: (14.5, 12.9, 11.8, 13.1), 32: (14.8, 13.4, 12.5, 13.4), 64: (14.9, 14.2, 13.6, 13.9)},
        (59, 32, 30, 40),
        {24: (0.2431, 0.1055, 0.1585), 32: (0.1985, 0.0818, 0.1242), 64: (0.1240, 0.0443, 0.0674)},
        {24: (18.522, 18.086, 9.337, 0.601), 32: (18.513, 18.086, 9.331, 0.626),
         64: (18.546, 18.097, 9.321, 0.762)},
    ),
    "6.2B": Qi(
        30, 32, 4096, 8, 3,
        {24: (4.32, 3.88, 3.50, 4.01), 32: (4.35, 4.00, 3.70, 4.08), 64: (4.39, 4.20, 4.03, 4.19)},
        (70, 42, 39, 48),
        {24: (0.2347, 0.0808, 0.1323), 32: (0.1898, 0.0628, 0.1045), 64: (0.1091, 0.0320, 0.0554)},
        {24: (29.718, 29.444, 19.927, 0.527), 32: (29.802, 29.428, 19.530, 0.577),
         64: (29.935, 29.621, 19.388, 0.535)},
    ),
    "14.6B": Qi(
        46, 40, 5120, 16, 1,
        {48: (1.81, 1.61, 1.40, 1.54), 64: (1.83, 1.67, 1.49, 1.59), 128: (1.85, 1.76, 1.64, 1.66)},
        (51, 33, 32, 39),
        {48: (0.2552, 0.1104, 0.1397), 64: (0.2082, 0.0852, 0.1088),
         128: (0.1251, 0.0445, 0.0576)},
        {48: (11.347, 11.248, 8.132, 0.377), 64: (11.307, 11.254, 8.101, 0.379),
         128: (11.325, 11.308, 8.109, 0.378)},
    ),
    "28.3B": Qi(
        62, 48, 6144, 32, 1,
        {96: (0.99, 0.87, 0.76, 0.82), 128: (1.00, 0.90, 0.80, 0.85),
         256: (1.00, 0.96, 0.88, 0.90)},
        (74, 44, 43, 58),
        {96: (0.2646, 0.1493, 0.1421), 128: (0.2168, 0.1164, 0.1106),
         256: (0.1352, 0.0624, 0.0594)},
        {96: (10.419, 10.207, 7.715, 0.408), 128: (10.408, 10.204, 7.703, 0.408),
         256: (10.402, 10.248, 7.698, 0.460)},
    ),
}  # fmt: skip
QI_METHODS = ("ZB-2p", "ZB-1p", "1F1B", "1F1B-I")


def qi_runs(model: Qi, microbatches: int) -> dict[str, Run]:
    """The schedules of the paper by ours; its 1F1B is that of Megatron-LM."""
    common: dict[str, Any] = {"partitions": model.stages, "microbatches": microbatches}
    return {
        "ZB-2p": Run(**common, pipeline="auto", active_microbatches=2 * model.stages),
        "ZB-1p": Run(**common, pipeline="zero_bubble", active_microbatches=model.stages),
        "1F1B": Run(**common, **MEGATRON_LM),
        "1F1B-I": Run(**common, **MEGATRON_LM, pieces=model.pieces),
    }


def between_steps(timing: Timing) -> float:
    """Time from step to step if no device waits for the others in between.

    The paper's optimizer needs no word of all stages (its section 4), so that a stage begins its
    next step when it has ended this one.
    """
    return float((timing.end_seconds - timing.start_seconds).max())


def segments_for(model: Transformer, run: Run, examples: int, layout: Layout) -> Segments:
    machine = machine_for(layout.cluster, model.precision)
    return segments_of(model, run.num_segments, examples, machine, layout.sharers)


def passes_table(models: Sequence[str]) -> None:
    """The passes of the cost model beside table 9."""
    print("\n## Passes: table 9 of arXiv 2401.10241, ms, and simulated\n")
    head("model", "F", "simulated", "B", "simulated", "W", "simulated")
    for name in models:
        model = QI[name]
        run = Run(partitions=model.stages)
        found = segments_for(model.transformer, run, model.examples, layout_of(A100, run))
        ours = [1e3 * float(part[1]) for part in (found.forward, found.backward, found.weights)]
        published = next(iter(model.milliseconds.values()))[:3]
        row(name, *(f"{x:.1f}" for pair in zip(published, ours, strict=True) for x in pair))


def bubble_table(models: Sequence[str]) -> None:
    """Bubbles of schedules with the paper's own times, beside table 5."""
    print("\n## Bubbles with the paper's own times: table 5 of arXiv 2401.10241, and simulated\n")
    methods = ("1F1B", "1F1B-I", "ZB-H1")
    head("model", "microbatches", *(cell for name in methods for cell in (name, "simulated")))
    for name in models:
        model = QI[name]
        for count, published in model.bubbles.items():
            runs = qi_runs(model, count)
            cells = []
            for run, theirs in zip(
                (runs["1F1B"], runs["1F1B-I"], runs["ZB-1p"]), published, strict=True
            ):
                *passes, transfer = model.milliseconds[count]
                seconds = np.repeat(np.array(passes)[:, None] / run.pieces, run.num_segments, 1)
                delays = np.full((2, run.num_segments), transfer)
                timing = time_chain(run, seconds, delays)
                ours = 1 - count * sum(passes) / between_steps(timing)
                cells += [f"{100 * theirs:.1f} %", f"{100 * ours:.1f} %"]
            row(name, count, *cells)


def throughput_table(models: Sequence[str]) -> list[float]:
    """Gains over 1F1B and memory beside table 4; returns how far the gains are off, in points."""
    print("\n## Throughput as a multiple of 1F1B: table 4 of arXiv 2401.10241, and simulated\n")
    others = ("ZB-2p", "ZB-1p", "1F1B-I")
    cells = [cell for name in others for cell in (name, "simulated")]
    head("model", "microbatches", *cells, "same order", "memory of 1F1B", "simulated")
    misses = []
    for name in models:
        model = QI[name]
        for count, values in model.throughput.items():
            published = dict(zip(QI_METHODS, values, strict=True))
            ours = {}
            for method, run in qi_runs(model, count).items():
                layout = layout_of(A100, run)
                segments = segments_for(model.transformer, run, model.examples, layout)
                ours[method] = 1 / between_steps(time_of(run, segments, layout))
            pairs = [(published[m] / published["1F1B"], ours[m] / ours["1F1B"]) for m in others]
            misses += [100 * (b - a) for a, b in pairs]
            step = simulate_transformer(
                model.transformer, A100, qi_runs(model, count)["1F1B"], count * model.examples
            )
            row(
                name,
                count,
                *(f"{x:.2f}" for pair in pairs for x in pair),
                "yes" if ordered(published) == ordered(ours) else "NO",
                f"{model.gigabytes[2]:g} GB",
                f"{step.peak_bytes / 1e9:.0f} GB",
            )
    return misses


def ordered(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda name: -values[name])


class Narayanan(NamedTuple):
    """A row of Megatron-LM's table: the model, how it was run, and teraFLOP/s of a GPU."""

    width: int
    layers: int
    heads: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    examples: int
    per_piece: int
    teraflops: float


MEGATRON = {
    "1.7B": Narayanan(2304, 24, 24, 1, 1, 32, 512, 16, 0, 137),
    "3.6B": Narayanan(3072, 30, 32, 2, 1, 64, 512, 16, 0, 138),
    "7.5B": Narayanan(4096, 36, 32, 4, 1, 128, 512, 16, 0, 142),
    "18.4B": Narayanan(6144, 40, 48, 8, 1, 256, 1024, 8, 0, 135),
    "39.1B": Narayanan(8192, 48, 64, 8, 2, 512, 1536, 4, 0, 138),
    "76.1B": Narayanan(10240, 60, 80, 8, 4, 1024, 1792, 2, 5, 140),
    "145.6B": Narayanan(12288, 80, 96, 8, 8, 1536, 2304, 2, 5, 148),
    "310.1B": Narayanan(16384, 96, 128, 8, 16, 1920, 2160, 1, 3, 155),
    "529.6B": Narayanan(20480, 105, 128, 8, 35, 2520, 2520, 1, 1, 163),
    "1008.0B": Narayanan(25600, 128, 160, 8, 64, 3072, 3072, 1, 0, 163),
}


def megatron_table(models: Sequence[str]) -> list[float]:
    """Shares of an A100's peak beside Megatron-LM's table; returns how far they are off."""
    print("\n## Share of the peak of an A100: table 1 of arXiv 2104.04473, and simulated\n")
    head("model", "GPUs", "tensor", "pipeline", "pieces", "published", "simulated", "bound by")
    misses = []
    for name in models:
        it = MEGATRON[name]
        model = Transformer(
            it.layers, it.width, it.heads, 2048, 51200, fused_attention=False, dropout=True,
            precision="float16",
        )  # fmt: skip
        replicas = it.gpus // (it.tensor * it.pipeline)
        run = Run(
            partitions=it.pipeline,
            replicas=replicas,
            microbatches=it.batch // (replicas * it.examples),
            pieces=it.layers // it.pipeline // it.per_piece if it.per_piece else 1,
            recompute="full",
            placement_strategy="spread",  # Megatron's ranks: tensor, then data, then pipeline
            **MEGATRON_LM,
            tensor_parallel=it.tensor,
        )
        step = simulate_transformer(model, SELENE, run, it.batch)
        # The paper's FLOPs (its equation 3) count the recomputed forward pass.
        flops = it.batch * (
            4 * it.layers * (model.product_flops + model.attention_flops) + 3 * model.head_flops
        )
        ours = flops / (it.gpus * step.seconds) / 312e12
        theirs = it.teraflops / 312
        misses.append(100 * (ours - theirs))
        cells = (it.gpus, it.tensor, it.pipeline, run.pieces)
        row(name, *cells, f"{100 * theirs:.0f} %", f"{100 * ours:.0f} %", step.bound)
    return misses


# Of arXiv 2405.15362: MFU. Table 4 at 512 microbatches, and values read off figure 7 (a) and (b).
V_SHAPES = {
    "38.5B": ((62, 7168, 64, 32, 1, 512),
              {"V-ZB": 53.2, "V-Half": 51.8, "1F1B": 47.1, "V-Min": 43.7, "1F1B-R": 37.2}),
    "9.6B": ((30, 5120, 40, 16, 2, 64),
             {"V-ZB": 51, "ZB-1P": 48.5, "V-Half": 46.5, "1F1B": 43.5, "V-Min": 40.5,
              "1F1B-R": 32}),
    "21B": ((46, 6144, 48, 24, 1, 96),
            {"V-ZB": 50, "ZB-1P": 47.5, "V-Half": 45.5, "1F1B": 42, "V-Min": 40.5, "1F1B-R": 32}),
}  # fmt: skip


def v_table(models: Sequence[str]) -> list[float]:
    """MFU as a multiple of 1F1B beside the V-schedule paper; returns how far it is off."""
    print("\n## MFU as a multiple of 1F1B: arXiv 2405.15362, and simulated\n")
    methods = ("V-ZB", "ZB-1P", "V-Half", "V-Min", "1F1B-R")
    head(
        "model", "microbatches", *(c for name in methods for c in (name, "simulated")), "same order"
    )
    misses = []
    for name in models:
        (layers, width, heads, stages, examples, count), published = V_SHAPES[name]
        model = Transformer(
            layers, width, heads, 1024, 50304, fused_attention=False, dropout=True,
            precision="float16",
        )  # fmt: skip
        common: dict[str, Any] = {"partitions": stages, "microbatches": count}
        runs = {
            "V-ZB": Run(**common, pipeline="zb_v"),
            "ZB-1P": Run(**common, pipeline="zero_bubble", active_microbatches=stages),
            "V-Half": Run(**common, pipeline="v_half"),
            "1F1B": Run(**common, **MEGATRON_LM),
            "V-Min": Run(**common, pipeline="v_min"),
            "1F1B-R": Run(**common, **MEGATRON_LM, recompute="full"),
        }
        ours = {}
        for method in published:
            run = runs[method]
            layout = layout_of(Cluster(5, 8, "a100"), run)
            segments = segments_for(model, run, examples, layout)
            ours[method] = 1 / between_steps(time_of(run, segments, layout))
        cells = []
        for method in methods:
            if method not in published:
                cells += ["", ""]
                continue
            pair = published[method] / published["1F1B"], ours[method] / ours["1F1B"]
            misses.append(100 * (pair[1] - pair[0]))
            cells += [f"{x:.2f}" for x in pair]
        row(name, count, *cells, "yes" if ordered(published) == ordered(ours) else "NO")
    return misses


def head(*titles: str) -> None:
    row(*titles)
    print(f"|{' --- |' * len(titles)}")


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def told(what: str, misses: Sequence[float]) -> None:
    within = sum(abs(miss) <= 5 for miss in misses)
    print(
        f"\n{what}: {within} of {len(misses)} within 5 points, the furthest "
        f"{max(misses, key=abs):+.1f} points"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest rows")
    parser.add_argument(
        "--measure", action="store_true", help="steps of two ranks, on this machine"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        names = ["quick"] if arguments.quick else ["mlp", "transformer"]
        misses = simulated_here.table(names, microbatches=8, steps=12)
        within = sum(abs(miss) <= 10 for miss in misses)
        furthest = max(misses, key=abs)
        print(f"\n{within} of {len(misses)} within 10 %, the furthest {furthest:+.0f} %")
        return 0
    few = 1 if arguments.quick else None
    start = time.process_time()
    passes_table(list(QI)[:few])
    bubble_table(list(QI)[:few])
    told("gains over 1F1B", throughput_table(list(QI)[:few]))
    told("share of the peak", megatron_table(list(MEGATRON)[: few and 2]))
    told("gains over 1F1B", v_table(list(V_SHAPES)[:few]))
    print(f"\n{time.process_time() - start:.0f} s of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
