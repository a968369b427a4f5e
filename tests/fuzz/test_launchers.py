"""The environments that launchers make, and what is left of one in the environment of another."""

from __future__ import annotations

import json
from typing import Any

from fuzz.bounds import cases, taken
from fuzz.strategies import (
    NUMBER_TEXTS,
    ODD_TEXTS,
    either,
    great,
    json_texts,
    mutated,
    mutilated,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st

from opensmp.distributed.launch.environment import first_host
from opensmp.distributed.launch.launchers import claim, detect

MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
HOSTS = '["algo-1", "algo-2"]'
OPENSMP_RUN = {
    "OPENSMP_RUN_RANK": "1",
    "OPENSMP_RUN_SIZE": "2",
    "OPENSMP_RUN_LOCAL_RANK": "1",
    "OPENSMP_RUN_LOCAL_SIZE": "2",
    "OPENSMP_RUN_MEETING": "127.0.0.1:4711",
    "OPENSMP_RUN_TOKEN": "secret",
    "OPENSMP_RUN_JOIN_SECONDS": "7.5",
    "OPENSMP_IDLE_SECONDS": "9",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job7",
}
SERVICE = {**OPEN_MPI, "SM_HOSTS": HOSTS, "SM_CURRENT_HOST": "algo-2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "run7",
    **MASTER,
}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[07-08,11],login",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "99",
    "SLURM_STEP_ID": "1",
}
CLUSTER = {
    "cluster": {"chief": ["a:2222"], "worker": ["b:2222", "[::1]:2222"], "ps": ["d:1"]},
    "task": {"type": "worker", "index": 1},
    "environment": "cloud",
}
LAUNCHERS = (
    OPENSMP_RUN,
    OPEN_MPI,
    {**OPEN_MPI, **MASTER},
    SERVICE,
    MPICH,
    {**MPICH, "SM_HOSTS": HOSTS},
    TORCHRUN,
    SLURM,
    {**SLURM, "PMI_RANK": "2", "PMI_SIZE": "4"},
    {"TF_CONFIG": json.dumps(CLUSTER)},
)
NUMBERS = st.sampled_from(NUMBER_TEXTS) | st.integers(0, 5).map(str) | great(("9", "1", " "))
NODES = ("node[07-09,12],login", "a,b", "r[1,3]c[02-04]", "n[003]", "n[1", "n]1[", "[[[]]]", "n[]")


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """Those of one launcher or of several, in which some variables are odd or gone."""
    found: dict[str, str] = {}
    for launcher in draw(st.lists(st.sampled_from(LAUNCHERS), min_size=1, max_size=2)):
        found.update(launcher)
    for name in draw(st.lists(st.sampled_from(sorted(found)), max_size=3)):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            found.pop(name, None)
        elif kind == 1:
            found[name] = draw(NUMBERS)
        elif kind == 2:
            found[name] = draw(mutilated(st.just(found.get(name, ""))))
        else:
            found[name] = draw(texts(found.get(name, "")) | json_texts(mutated(st.just(CLUSTER))))
    if draw(st.integers(0, 9)) == 0:
        found["OPENSMP_CLAIMED_BY"] = draw(texts("7 []"))
    return found


def launched(environ: dict[str, str]) -> None:
    """What is taken is a place in a run that the rest of the library can use."""
    result = taken(lambda: detect(environ))
    if result.error is not None:
        return
    launch = result.value
    assert 0 <= launch.rank < launch.size <= 100_000
    assert launch.local_size is None or 0 < launch.local_size <= launch.size
    assert launch.local_rank is None or 0 <= launch.local_rank < launch.size
    assert launch.join_seconds > 0
    assert launch.idle_seconds >= 0
    launch.token.encode()
    if launch.size > 1:
        host, port = launch.meeting
        assert port > 0
        assert port + launch.num_meeting_ports - 1 <= 65535
        host.encode("idna")
        assert not set(host) & set(" \x00[]")
        assert launch.addresses is None or len(launch.addresses) == launch.size
    taken(lambda: claim(launch, dict(environ), 1234))


@cases()
@given(environ=environments())
def test_environments_of_launchers_are_taken_or_refused(environ):
    launched(environ)


@cases()
@given(text=json_texts(mutated(st.just(CLUSTER))))
def test_clusters_of_tensorflow_are_taken_or_refused(text):
    launched({"TF_CONFIG": text})


@cases()
@given(
    addresses=st.lists(
        either(
            st.sampled_from(("a:1", "b.c:2", "10.0.0.1:3", "[fe80::1]:4")),
            texts("node0:2222", "[::1]:80"),
        ),
        min_size=2,
        max_size=5,
    ),
    index=either(st.integers(0, 2), st.sampled_from((*NUMBER_TEXTS, None, 1.0, True, -1, 10**30))),
)
def test_addresses_of_a_cluster_are_taken_or_refused(addresses, index):
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    launched({"TF_CONFIG": json.dumps(cluster)})


@cases()
@given(nodes=st.sampled_from(NODES) | texts(*NODES) | great((*NODES, "[1],", "a[1-2]", "[1]")))
def test_node_lists_of_slurm_are_taken_or_refused(nodes):
    result = taken(lambda: first_host(nodes), refusals=(ValueError,))
    assert result.error is not None or result.value.encode("idna")
    launched({**SLURM, "SLURM_STEP_NODELIST": nodes})


@cases()
@given(
    hosts=json_texts(mutated(st.just(["algo-1", "algo-2"]))) | texts(HOSTS),
    launcher=st.sampled_from((SERVICE, MPICH)),
)
def test_hosts_of_a_service_are_taken_or_refused(hosts, launcher):
    launched({**launcher, "SM_HOSTS": hosts})


def test_every_launcher_is_taken_as_it_is():
    ranks: list[Any] = [detect(environ).rank for environ in LAUNCHERS if environ is not OPEN_MPI]
    assert ranks == [1, 3, 3, 1, 1, 1, 2, 2, 2]
    assert len(set(ODD_TEXTS)) == len(ODD_TEXTS)
