"""Candidates for the settings of a run, ranked by the cost model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras

from opensmp.base.divisors import divisors
from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.report import recommendation
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config import Config
from opensmp.execution.context import Prepared
from opensmp.execution.profiling.tuning.trial import TUNED, Candidate

_MOST_COUNTS = 5
_MOST_OF_A_COUNT = 2
_PER_PARTITION = 8  # microbatches: beyond that the bubble is small, and each costs time
_LEAST_ROWS = 2
_SIMULATED = _MOST_COUNTS


class TrainedCall(NamedTuple):
    """The most expensive model call of a training step, of which candidates are made."""

    call: Prepared
    microbatches: int

    @classmethod
    def of(cls, calls: Sequence[Prepared], microbatches: int) -> TrainedCall:
        """That of all calls of a step."""
        return cls(max(calls, key=lambda call: len(call.traced.operations)), microbatches)

    @property
    def rows(self) -> int | None:
        """Rows of a whole batch in one replica, if they are known."""
        shapes = (tensor.shape for tensor in self.call.traced.inputs)
        rows = next((shape[0] for shape in shapes if shape.rank), None)
        return None if rows is None else int(rows) * self.microbatches


class Ranked(NamedTuple):
    """Candidates, the best by prediction first; `note` says why there is no prediction."""

    candidates: list[Candidate]
    note: str = ""


def rank(config: Config, trained: TrainedCall, most: int, fixed: Iterable[str] = ()) -> Ranked:
    """Proposes at most `most` settings other than those of `config`; `fixed` keys stay."""
    keys = set(TUNED) - set(fixed)
    counts = _counts(config, trained, keys)
    rows, trace_rows = trained.rows, trained.call.trace_rows
    if rows is None or trace_rows is None:
        note = "the cost model does not know the rows of a batch"
        return Ranked(_by_rule(config, counts, most, keys), note)
    try:
        found = _predicted(config, trained, trace_rows, rows, counts)
    except Exception as error:  # a model may refuse to be traced again in another size
        note = f"the cost model failed ({type(error).__name__}: {str(error)[:200]})"
        return Ranked(_by_rule(config, counts, most, keys), note)
    return Ranked(_chosen(config, found, most, keys))


def _counts(config: Config, trained: TrainedCall, keys: set[str]) -> list[int]:
    """Numbers of microbatches to try: that of the configuration, and those around 1 to 8 P."""
    own, rows = config.microbatches, trained.rows
    if "microbatches" not in keys:
        return [own]
    least = _LEAST_ROWS if _normalises(trained) else 1
    wanted = [n * config.partitions for n in (1, 2, 4, _PER_PARTITION)]
    if rows is None:  # only divisors of what the script divides are safe
        possible = [n for n in divisors(own) if n > 1]
    else:
        possible = [n for n in divisors(rows) if rows // n >= least]
    near = [min(possible, key=lambda n: (abs(n - want), n), default=own) for want in wanted]
    return list(dict.fromkeys([own, *near]))[:_MOST_COUNTS]


def _normalises(trained: TrainedCall) -> bool:
    kind = keras.layers.BatchNormalization
    return any(isinstance(span.layer, kind) for span in trained.call.traced.spans)


def _predicted(
    config: Config,
    trained: TrainedCall,
    trace_rows: Callable[[int], TracedGraph],
    rows: int,
    counts: list[int],
) -> list[Candidate]:
    machine = trained.call.plan.settings.machine
    found = recommendation.recommend(
        lambda count: coarsen(trace_rows(rows // count), machine),
        rows,
        machine,
        partitions=[config.partitions],
        microbatches=counts,
        optimize=config.optimize,
        contiguous=config.contiguous,
        simulated=_SIMULATED,
    )
    return [
        Candidate(
            {
                "microbatches": each.settings.microbatches,
                "pipeline": each.settings.pipeline,
                "pieces_per_partition": each.settings.pieces,
            },
            each.step_seconds,
        )
        for each in found
        if each.fits
    ]


def _by_rule(config: Config, counts: list[int], most: int, keys: set[str]) -> list[Candidate]:
    """Candidates without predictions: some numbers of microbatches, with two schedules."""
    pipelines = ["interleaved", "zero_bubble"] if config.partitions > 1 else [config.pipeline]
    found = [
        Candidate({"microbatches": count, "pipeline": pipeline})
        for pipeline in pipelines
        for count in sorted(counts, reverse=True)
    ]
    return _chosen(config, found, most, keys)


def _chosen(
    config: Config, found: Iterable[Candidate], most: int, keys: set[str]
) -> list[Candidate]:
    """The first ones that can be tried and differ; few with one number of microbatches."""
    possible = set(keys)
    if not config.auto_partition or config.plan is not None:
        possible.discard("pieces_per_partition")  # the partitions are given
    values = config.to_dict()
    seen: list[Mapping[str, Any]] = [{key: values[key] for key in TUNED}]
    per_count: Counter[int] = Counter()
    chosen = []
    for each in found:
        wanted = {key: values[key] for key in TUNED} | each.changes
        if any(wanted[key] != values[key] for key in TUNED if key not in possible):
            continue
        if wanted in seen or per_count[wanted["microbatches"]] >= _MOST_OF_A_COUNT:
            continue
        seen.append(wanted)
        per_count[wanted["microbatches"]] += 1
        changes = {key: wanted[key] for key in TUNED if wanted[key] != values[key]}
        given = config.active_microbatches
        if given is not None and "active_microbatches" not in keys:
            changes["active_microbatches"] = min(given, wanted["microbatches"])
        chosen.append(Candidate(changes, each.predicted_seconds))
    return chosen[:most]
