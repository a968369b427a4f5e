"""`opensmp run --min-nodes` over machines that are network namespaces of this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hosts.program import plain_losses
from machines import Machines, machines_or_skip
from patience import patient
from processes import environ_of_tests

RUN = [sys.executable, "-m", "opensmp", "run"]
SECONDS = 5

# Ranks that need nothing of each other: the first run fails on all machines when a file is there.
WAITING = """
import os, sys, time
name = "OPENSMP_RUN_"
rank, size, restart = (os.environ[name + key] for key in ("RANK", "SIZE", "RESTART"))
print("STARTED", rank, size, restart, flush=True)
if restart == "0":
    while not os.path.exists("fail"):
        time.sleep(0.05)
    sys.exit(3)
"""

# Two replicas, each on a machine; before the fourth step of the first run they stand still.
TRAINING = """
import json, os, time
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from hosts.program import ROWS, WIDTH, data, net
smp.init({"microbatches": 4})
model = smp.DistributedModel.from_keras(net(WIDTH, 2))
x, y = data(WIDTH)
count = ROWS // smp.dp_size()
own = slice(smp.dp_rank() * count, (smp.dp_rank() + 1) * count)
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.SGD(0.5)

@smp.step
def forward_backward(x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    return tape.gradient(loss, model.trainable_variables), loss

@tf.function
def train(x, y):
    gradients, loss = forward_backward(x, y)
    gradients = [smp.allreduce(gradient.accumulate()) for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return smp.allreduce(loss.reduce_mean())

checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
manager = smp.CheckpointManager(checkpoint, "saved", max_to_keep=2)
manager.restore()
is_first = os.environ["OPENSMP_RUN_RESTART"] == "0"
while (step := int(optimizer.iterations)) < 6:
    if is_first and step == 3:
        print("STARTED", flush=True)
        time.sleep(300)
    loss = float(train(tf.constant(x[own]), tf.constant(y[own])))
    manager.save()
    print("LOSS", json.dumps([step, smp.size(), loss]), flush=True)
"""


def start(
    machines: Machines, node: int, *more: Any, count: int = 1, secret: str = "x"
) -> subprocess.Popen[str]:
    command = [*RUN, "-n", count, "--nnodes", len(machines.names), "--node-rank", node, "-a"]
    command += ["--master", f"{machines.names[0]}:29400", "--max-restarts", 2]
    command += ["--join-seconds", SECONDS, *more, "s.py"]
    # With processes of its own: who watches over ranks would find those of the other machines.
    environ = environ_of_tests({"OPENSMP_RUN_TOKEN": secret})
    return machines.start(node, command, environ, own_pids=True)


def start_all(
    machines: Machines, counts: Sequence[int], *more: Any, script: str = WAITING
) -> list[subprocess.Popen[str]]:
    """Starts the script on all machines, and waits until it stands still there."""
    (machines.folder / "s.py").write_text(script)
    found = [start(machines, node, *more, count=count) for node, count in enumerate(counts)]
    for process, count in zip(found, counts, strict=True):
        lines = ""
        assert process.stdout is not None
        while lines.count("STARTED") < count:
            line = process.stdout.readline()
            assert line, lines
            lines += line
    return found


def again(text: str) -> list[str]:
    """What the ranks of the second run have printed."""
    return sorted(line[4:] for line in text.splitlines() if "STARTED" in line and line[-2:] == " 1")


def fail(machines: Machines) -> None:
    (machines.folder / "fail").write_text("")


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=patient(60 + SECONDS))[0]


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    time.sleep(0.2)


def test_machines_that_are_left_start_again_with_their_ranks_renumbered():
    with machines_or_skip(3) as machines:
        first, middle, last = start_all(machines, [2, 2, 2], "--min-nodes", 2)
        kill(middle)
        fail(machines)
        outputs = output(first), output(last)
    assert (first.returncode, last.returncode) == (0, 0), outputs
    assert "restart 1: 2 machines of 3, 4 ranks" in outputs[0]
    assert [again(each) for each in outputs] == [
        ["STARTED 0 4 1", "STARTED 1 4 1"],
        ["STARTED 2 4 1", "STARTED 3 4 1"],
    ]


def test_all_machines_that_are_there_go_on_without_waiting():
    with machines_or_skip(2) as machines:
        processes = start_all(machines, [1, 1], "--min-nodes", 1)
        fail(machines)
        outputs = [output(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "restart 1: 2 machines of 2, 2 ranks" in outputs[0]
    assert "STARTED 1 2 1" in outputs[1]


def test_too_few_machines_are_an_error_that_says_how_many():
    with machines_or_skip(3) as machines:
        processes = start_all(machines, [1, 1, 1], "--min-nodes", 3)
        kill(processes[1])
        fail(machines)
        outputs = [output(processes[0]), output(processes[2])]
    text = "no restart: 2 of 3 machines are left after 5 s, fewer than --min-nodes 3"
    assert all(text in each for each in outputs), outputs
    assert [processes[0].returncode, processes[2].returncode] == [3, 3]


def test_machines_left_that_make_up_no_whole_replicas_are_not_used():
    with machines_or_skip(3) as machines:
        more = ["--partitions", 3, "--auto-partition", "--min-nodes", 2]
        processes = start_all(machines, [1, 1, 1], *more)
        kill(processes[2])
        fail(machines)
        outputs = [output(processes[0]), output(processes[1])]
    text = "and no number from --min-nodes 2 on makes up whole replicas"
    assert all(text in each for each in outputs), outputs


def test_without_machine_0_the_others_say_so():
    with machines_or_skip(2) as machines:
        processes = start_all(machines, [1, 1], "--min-nodes", 1)
        kill(processes[0])
        fail(machines)
        text = output(processes[1])
    assert "no restart: the launcher of machine 0 at" in text
    assert "has not answered for 20 s" in text
    assert processes[1].returncode == 3


def test_machines_with_other_numbers_of_ranks_are_told_so():
    with machines_or_skip(2) as machines:
        processes = start_all(machines, [1, 2], "--min-nodes", 1)
        fail(machines)
        outputs = [output(process) for process in processes]
    text = "machine 1 has -n 2, machine 0 has -n 1; expected the same on all machines"
    assert all(text in each for each in outputs), outputs


def test_training_goes_on_from_the_last_checkpoint_when_a_machine_is_gone():
    with machines_or_skip(2) as machines:
        first, second = start_all(machines, [1, 1], "--min-nodes", 1, script=TRAINING)
        kill(second)
        text = output(first)
    assert first.returncode == 0, text
    found = [json.loads(line[9:]) for line in text.splitlines() if line.startswith("[0] LOSS ")]
    assert [each[:2] for each in found] == [[step, 1] for step in (3, 4, 5)], text
    np.testing.assert_allclose([each[2] for each in found], plain_losses(6, 4, 2)[3:], rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "secret", "expected"),
    [
        (["--min-nodes", 3, "--nnodes", 2, "--max-restarts", 1], "x", "no more than --nnodes says"),
        (["--min-nodes", 1, "--max-restarts", 1], "x", "expected several machines"),
        (["--min-nodes", 1, "--nnodes", 2], "x", "without --max-restarts"),
        (["--min-nodes", 1, "--nnodes", 2, "--max-restarts", 1], "", "without a secret"),
        (["--min-nodes", 1, "--hosts", "a,b", "--max-restarts", 1], "x", "leave it out with"),
    ],
)
def test_wrong_options_are_refused_with_what_mends_them(tmp_path, flags, secret, expected):
    (tmp_path / "s.py").write_text("")
    master = [] if "--hosts" in flags or "--nnodes" not in flags else ["--master", "a:29400"]
    done = subprocess.run(
        list(map(str, [*RUN, *flags, *master, tmp_path / "s.py"])),
        env=environ_of_tests({"OPENSMP_RUN_TOKEN": secret}),
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
