"""Ranks on several machines, which are network namespaces of this one."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
from hosts.program import plain_losses
from machines import Machines, machines_or_skip
from patience import patient
from processes import environ_of_tests

from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from latency import measure

PROGRAM = Path(__file__).with_name("program.py")
STEPS, MICROBATCHES = 4, 4
LIMIT_SECONDS = 100.0


def by_hand(machines: Machines, homes: Sequence[int], rank: int) -> Mapping[str, Any]:
    """The variables of a rank that is started by hand, where rank 0 is given by its name."""
    return {
        "RANK": rank,
        "WORLD_SIZE": len(homes),
        "MASTER_ADDR": machines.names[homes[0]],
        "MASTER_PORT": 29571,
        "OPENSMP_RUN_TOKEN": "x",
    }


def start(
    machines: Machines,
    homes: Sequence[int],
    config: Mapping[str, Any],
    steps: int = STEPS,
    seconds: float = 0.0,
    variables: Any = by_hand,
    **options: Any,
) -> list[Popen[str]]:
    """Starts the program as one rank for each element of `homes`, the machine that it is on."""
    given = json.dumps({"microbatches": MICROBATCHES, **config})
    return [
        machines.start(
            home,
            [sys.executable, PROGRAM, given, steps, seconds],
            environ_of_tests(variables(machines, homes, rank)),
            **options,
        )
        for rank, home in enumerate(homes)
    ]


def ends(processes: Sequence[Popen[str]]) -> list[str]:
    """What each process has printed, once all have ended."""
    outputs = [""] * len(processes)

    def read(number: int) -> None:
        outputs[number], _ = processes[number].communicate()

    threads = [threading.Thread(target=read, args=[i]) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + patient(LIMIT_SECONDS)
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = [number for number, thread in enumerate(threads) if thread.is_alive()]
    for process in processes:
        process.kill()
    for thread in threads:
        thread.join(10)
    assert not late, f"ranks {late} did not end:\n" + "\n---\n".join(outputs)
    return outputs


def results(processes: Sequence[Popen[str]]) -> list[dict[str, Any]]:
    """What the ranks have found, by rank; all must have ended well."""
    outputs = ends(processes)
    assert all(process.returncode == 0 for process in processes), "\n---\n".join(outputs)
    lines = [line for text in outputs for line in text.splitlines()]
    found = [json.loads(line.split("RESULT ")[1]) for line in lines if "RESULT " in line]
    return sorted(found, key=lambda result: result["rank"])


def trains_as_plain_keras(
    found: Sequence[Mapping[str, Any]], parts: int, layers: int, steps: int = STEPS, width: int = 8
) -> None:
    """Checks the losses of all ranks; `parts` are the microbatches of all replicas together."""
    expected = plain_losses(steps, parts, layers, width)
    for result in found:
        np.testing.assert_allclose(result["losses"], expected, rtol=2e-6)


def wait_for_ready(process: Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "READY\n":
            return
    raise AssertionError("the program ended before its second step")


def test_pipeline_over_machines_whose_names_mean_their_loopback():
    """As the installer of Debian writes /etc/hosts: `127.0.1.1 name`."""
    with machines_or_skip(2, loopback_names=True) as machines:
        found = results(start(machines, [0, 1], {"partitions": 2}))
    trains_as_plain_keras(found, MICROBATCHES, layers=3)
    assert [each["local"] for each in found] == [[0, 1], [0, 1]]


def test_replicas_over_a_link_of_100_megabits():
    """Their gradients of 8 MiB take most of a second, in each step."""
    rate, width = 100e6 / 8, 1024
    with machines_or_skip(2, delay_seconds=0.0, bytes_per_second=rate) as machines:
        found = results(start(machines, [0, 1], {"partitions": 1, "width": width}))
    trains_as_plain_keras(found, 2 * MICROBATCHES, layers=2, width=width)
    for each in found:
        assert min(each["times"]) > 0.9 * 2 * width * width * 4 / rate


def test_replicas_over_machines_that_have_only_ipv6():
    with machines_or_skip(2, version=6) as machines:
        found = results(start(machines, [0, 1], {"partitions": 1, "microbatches": 2}))
    trains_as_plain_keras(found, 2 * 2, layers=2)


def test_two_replicas_of_two_ranks_each_in_containers_of_one_name():
    """Each container counts its processes from 1, so that no process can find another's memory."""

    def variables(machines: Machines, homes: Sequence[int], rank: int) -> Mapping[str, Any]:
        address = {"MASTER_ADDR": machines.addresses[homes[0]]}
        return {**by_hand(machines, homes, rank), **address}

    config = {"partitions": 2, "placement_strategy": "spread"}
    with machines_or_skip(2, alike=True) as machines:
        processes = start(machines, [0, 0, 1, 1], config, variables=variables, own_pids=True)
        found = results(processes)
    trains_as_plain_keras(found, 2 * MICROBATCHES, layers=3)
    assert [each["group"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_pipeline_over_three_machines_survives_a_cable_that_is_out_for_three_seconds():
    with machines_or_skip(3) as machines:
        processes = start(machines, [0, 1, 2], {"partitions": 3}, steps=24, seconds=6)
        wait_for_ready(processes[0])
        machines.cut(1)
        time.sleep(3)
        machines.plug(1)
        found = results(processes)
    trains_as_plain_keras(found, MICROBATCHES, layers=4, steps=24)


def test_machine_that_is_gone_is_named_by_the_others():
    with machines_or_skip(2) as machines:
        processes = start(machines, [0, 1], {"partitions": 2}, steps=10_000, seconds=500)
        wait_for_ready(processes[0])
        machines.cut(1)
        processes[1].kill()
        began = time.monotonic()
        outputs = ends(processes)
        assert time.monotonic() - began < patient(20)
        assert processes[0].returncode == ENDED_BY_PEER, outputs[0]
        zero, one = machines.names
        text = f"rank 0 on {zero} and rank 1 on {one} cannot hear each other"
        assert text in outputs[0]
        assert f"or {one} is down" in outputs[0]


def test_latency_is_not_paid_for_each_microbatch():
    """A round trip of 10 ms, with 32 microbatches: one for each would be 320 ms."""
    config = {"pipeline": "simple", "microbatches": 32}
    near, far = measure({"config": config, "width": 64, "layers": 2, "rows": 4}, 0.01, rounds=5)
    assert far - near < 160, (near, far)
