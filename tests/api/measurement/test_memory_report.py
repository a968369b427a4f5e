from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks, run_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR, Net, batch

import opensmp as smp
from opensmp.errors import NotInitializedError, StepError
from opensmp.execution.profiling import peak_memory

MEBI = 1 << 20

ONE_RANK_OF_TWO = f"""
import opensmp as smp
smp.init({TWO_BY_FOUR})
{STEP_OF_TWO}
for _ in range(3):
    forward(tf.ones([8, 4]))
"""


def forward_of(model):
    @smp.step
    def forward(x):
        return model(x)

    return forward


def test_each_partition_has_a_measured_and_a_predicted_peak(smp_init):
    smp_init(TWO_BY_FOUR)
    model = Net()
    forward_of(model)(batch())
    report = smp.memory_report()
    first, second = report.partitions
    assert [row.partition for row in report.partitions] == [0, 1]
    assert [row.device for row in report.partitions] == ["/device:CPU:0", "/device:CPU:1"]
    predicted = model.plan.prediction.peak_bytes
    assert (first.predicted_bytes, second.predicted_bytes) == predicted
    assert first.peak_bytes == second.peak_bytes
    assert first.shares == second.shares == (0, 1)
    assert 0 < first.before_bytes <= first.peak_bytes
    assert first.measured_by == "resident"


def test_peak_grows_with_what_a_step_takes(smp_init):
    smp_init(TWO_BY_FOUR)
    forward = forward_of(Net())
    forward(batch())
    before = smp.memory_report().partitions[0].peak_bytes
    rows = tf.ones([24 * MEBI, 5])  # 480 MiB
    forward(rows)
    del rows
    after = smp.memory_report().partitions[0].peak_bytes
    assert after - before >= 256 * MEBI
    assert smp.memory_report().partitions[0].peak_bytes == after


def test_report_is_a_table_and_values_for_json(smp_init):
    smp_init(TWO_BY_FOUR)
    forward_of(Net())(batch())
    report = smp.memory_report()
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "partition",
        "rank",
        "device",
        "predicted",
        "peak",
        "before",
        "measured",
        "by",
    ]
    assert lines[1].split()[:3] == ["0", "0", "CPU:0"]
    assert "with 0" in lines[2]
    assert "MiB" in lines[1] or "GiB" in lines[1]
    assert "at the end of smp.init" in lines[3]
    values = json.loads(json.dumps(report.as_dict()))
    assert [row["partition"] for row in values["partitions"]] == [0, 1]
    assert values["partitions"][1]["shares"] == [0, 1]
    assert values["partitions"][0]["peak_bytes"] == report.partitions[0].peak_bytes


def test_predictions_of_several_models_add_up(smp_init):
    smp_init(TWO_BY_FOUR)
    models = [Net(), Net(units=5)]
    for model in models:
        forward_of(model)(batch())
    sums = np.sum([model.plan.prediction.peak_bytes for model in models], axis=0)
    assert [row.predicted_bytes for row in smp.memory_report().partitions] == sums.tolist()


def test_before_the_first_step_there_is_nothing_to_report(smp_init):
    smp_init(TWO_BY_FOUR)
    model = Net()
    with pytest.raises(StepError, match=r"no DistributedModel has run since smp\.init"):
        smp.memory_report()
    with pytest.raises(StepError, match="Call it after a step, fit, evaluate or predict"):
        smp.memory_report(gather=True)
    forward_of(model)(batch())
    assert smp.memory_report().partitions


def test_without_init_it_is_refused():
    with pytest.raises(NotInitializedError, match=r"smp\.memory_report"):
        smp.memory_report()


def test_after_fit(smp_init):
    smp_init(TWO_BY_FOUR)
    model = Net()
    model.compile("sgd", "mse")
    model.fit(batch(), tf.ones([8, 3]), batch_size=8, epochs=10, verbose=0)
    assert len(smp.memory_report().partitions) == 2


def test_device_whose_allocator_counts_has_a_peak_of_its_own(smp_init, monkeypatch):
    smp_init(TWO_BY_FOUR)
    forward_of(Net())(batch())
    counted = {"/device:CPU:0": None, "/device:CPU:1": 5 * MEBI}
    monkeypatch.setattr(peak_memory, "peak_allocated_bytes", counted.get)
    first, second = smp.memory_report().partitions
    assert (first.measured_by, first.shares) == ("resident", (0,))
    assert (second.measured_by, second.shares) == ("allocator", (1,))
    assert (second.peak_bytes, second.before_bytes) == (5 * MEBI, 0)
    assert "allocator of the device" in str(smp.memory_report())


def test_peak_of_the_process_is_never_below_what_is_there_now():
    assert 0 < peak_memory.resident_bytes() <= peak_memory.peak_resident_bytes()
    assert peak_memory.peak_allocated_bytes("/device:CPU:0") is None


class TestRanks:
    def test_one_rank_alone_may_ask(self):
        first, second = check_ranks(
            ONE_RANK_OF_TWO
            + """
if smp.rank() == 0:
    print(smp.memory_report())
for _ in range(10):
    forward(tf.ones([8, 4]))
print("end")
""",
            2,
        )
        assert second.lines[-1] == "end"
        table = first.output.splitlines()
        own, other = (line.split() for line in table if line.startswith(("0 ", "1 ")))
        assert own[:3] == ["0", "0", "CPU:0"]
        assert other[:2] == ["1", "1"]
        assert "not measured here" in first.output
        assert "smp.memory_report(gather=True) in all ranks" in first.output

    def test_gathered_it_is_the_same_in_all_ranks(self):
        results = check_ranks(
            ONE_RANK_OF_TWO
            + """
import json
report = smp.memory_report(gather=True)
print(json.dumps(report.as_dict()))
assert "not measured here" not in str(report)
""",
            2,
        )
        first, second = (json.loads(result.lines[-1])["partitions"] for result in results)
        assert first == second
        assert [(row["rank"], row["partition"]) for row in first] == [(0, 0), (1, 1)]
        assert all(row["peak_bytes"] > row["before_bytes"] > 0 for row in first)

    def test_replicas_each_have_their_rows(self):
        results = check_ranks(
            """
import opensmp as smp, tensorflow as tf, keras
smp.init({"partitions": 2, "microbatches": 2, "processes_per_replica": 1})
model = smp.DistributedModel.from_keras(
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4)])
)
model.compile("sgd", "mse")
model.fit(tf.ones([8, 4]), tf.ones([8, 4]), batch_size=8, verbose=0)
rows = smp.memory_report(gather=True).partitions
print([(row.rank, row.partition, row.shares) for row in rows], len(smp.memory_report().partitions))
""",
            2,
        )
        both = (0, 1)
        expected = [(rank, partition, both) for rank in (0, 1) for partition in (0, 1)]
        assert [result.lines[-1] for result in results] == [f"{expected} 2"] * 2

    def test_gathering_by_one_rank_is_an_error_and_does_not_hang(self):
        results = run_ranks(
            ONE_RANK_OF_TWO
            + """
if smp.rank() == 0:
    smp.memory_report(gather=True)
""",
            2,
        )
        assert results[0].code != 0
        assert "smp.memory_report" in results[0].output
