"""`TF_CONFIG` with a cluster of two or more tasks: the cluster, and this process's task in it."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from opensmp.base.message_text import numbered, shown
from opensmp.base.strict_json import parse_json
from opensmp.distributed.launch.environment import MOST_PROCESSES, Variables, parse_address
from opensmp.distributed.launch.launch import Launch, Launcher, launch_of
from opensmp.errors import LaunchError

NAME = "TF_CONFIG"
_JOBS = ("chief", "master", "worker")
_INDEX = re.compile(r"[0-9]{1,9}")


class ClusterPlace(NamedTuple):
    """This process and all others, according to `TF_CONFIG`.

    Attributes:
        rank: Rank of this process: the chief first, then the workers.
        addresses: `host:port` of every rank.
        hosts: The host of every rank.
        jobs: The participating jobs, as JSON; the same in every process of the cluster.
    """

    rank: int
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]
    jobs: str


def read_tf_config(text: str) -> ClusterPlace | None:
    """Parses the JSON with `cluster` and `task`, or ""; None if there are no other processes."""
    if not text.strip():
        return None
    cluster, task = _cluster_and_task(text)
    jobs = {job: cluster[job] for job in _JOBS if cluster.get(job)}
    faults = [
        f"the addresses of {job!r} are {shown(addresses, 40)}, no list"
        for job, addresses in jobs.items()
        if not isinstance(addresses, list)
    ]
    if faults:
        raise _no_rank(text, faults)
    tasks = [(job, index) for job, addresses in jobs.items() for index in range(len(addresses))]
    if len(tasks) <= 1 and (not tasks or task.get("type") in (None, *jobs)):
        return None
    if len(tasks) > MOST_PROCESSES:
        raise _no_rank(text, [f"these are {len(tasks)} tasks, more than {MOST_PROCESSES}"])
    rank = _rank(tasks, task)
    if rank is None:
        faults.append(f"its task is {shown(task)}, none of {' and '.join(jobs)}")
    addresses = [address for job in jobs.values() for address in job]
    hosts = _hosts(tasks, addresses, faults)
    if faults or rank is None:
        raise _no_rank(text, faults)
    return ClusterPlace(rank, tuple(addresses), hosts, json.dumps(jobs, sort_keys=True))


def _cluster_and_task(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        given = parse_json(text)
    except ValueError as error:
        raise _no_rank(text, [str(error)]) from None
    if not isinstance(given, dict):
        raise _no_rank(text, ["it is no JSON object"])
    cluster, task = given.get("cluster", {}), given.get("task", {})
    faults = [
        f"its {name} is {shown(part, 40)}, no JSON object"
        for name, part in (("cluster", cluster), ("task", task))
        if not isinstance(part, dict)
    ]
    if faults:
        raise _no_rank(text, faults)
    return cluster, task


def _rank(tasks: list[tuple[str, int]], task: dict[str, Any]) -> int | None:
    kind, index = task.get("type"), task.get("index")
    if isinstance(index, str) and _INDEX.fullmatch(index):  # some tools write the index as a string
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or (kind, index) not in tasks:
        return None
    return tasks.index((str(kind), index))


def _hosts(
    tasks: list[tuple[str, int]], addresses: list[Any], faults: list[str]
) -> tuple[str, ...]:
    hosts = []
    seen: dict[str, str] = {}
    for (job, index), address in zip(tasks, addresses, strict=True):
        name = f"{job} {index}"
        if not isinstance(address, str):
            faults.append(f"the address of {name} is {shown(address, 40)}, no text")
            continue
        first = seen.setdefault(address, name)
        if first != name:
            faults.append(f"{name} has the same address as {first}")
        try:
            hosts.append(parse_address(address)[0])
        except ValueError as error:
            faults.append(f"the address of {name} {error}")
    return tuple(hosts)


def _no_rank(text: str, faults: list[str]) -> LaunchError:
    listed = faults[0] if len(faults) == 1 else "\n" + "\n".join(numbered(faults)) + "\n"
    return LaunchError(
        f"TF_CONFIG names no rank for this process ({listed}). "
        "Expected: a JSON object with a cluster of chief and worker addresses and a task "
        'among them, such as {"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": '
        f'"worker", "index": 0}}}}. Received: {text[:300]}. Parameter servers and evaluators '
        "take no part in a pipeline: do not start this script in them."
    )


def _read(variables: Variables) -> Launch | None:
    place = read_tf_config(variables.text(NAME))
    if place is None:
        return None
    return launch_of(
        NAME,
        variables,
        rank=place.rank,
        size=len(place.addresses),
        addresses=place.addresses,
        job=f"TF_CONFIG{place.jobs}",
        host=place.hosts[0],
    )


def _place(variables: Variables) -> tuple[int, int] | None:
    launch = _read(variables)
    return None if launch is None else (launch.rank, launch.size)


LAUNCHER = Launcher(NAME, NAME, _read, _place)
