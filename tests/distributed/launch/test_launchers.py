from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensmp.base.message_text import shown
from opensmp.distributed.launch import conventions
from opensmp.distributed.launch.launchers import ALONE, LAUNCHERS, claim, detect
from opensmp.errors import LaunchError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job7",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
CLUSTER = {"chief": ["a:2222"], "worker": ["b:2222", "c:2222"]}


def tf_config(job: str, index: int, cluster: object = CLUSTER) -> dict[str, str]:
    task = {"type": job, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def test_no_launcher_is_a_process_of_its_own():
    assert detect({}) is ALONE
    assert detect({"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is ALONE


@pytest.mark.parametrize(
    "environ",
    [
        {"OPENSMP_RUN_RANK": "0", "OPENSMP_RUN_SIZE": "1", "OPENSMP_RUN_MEETING": "127.0.0.1:1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        tf_config("worker", 0, {"worker": ["a:1"]}),
    ],
)
def test_launcher_of_one_process_is_none(environ):
    assert detect(environ) is ALONE


def test_own_launcher():
    launch = detect(
        {
            "OPENSMP_RUN_RANK": "1",
            "OPENSMP_RUN_SIZE": "2",
            "OPENSMP_RUN_LOCAL_RANK": "1",
            "OPENSMP_RUN_LOCAL_SIZE": "2",
            "OPENSMP_RUN_MEETING": "127.0.0.1:4711",
            "OPENSMP_RUN_TOKEN": "secret",
            "OPENSMP_RUN_JOIN_SECONDS": "7.5",
            "OPENSMP_IDLE_SECONDS": "9",
            "RANK": "5",  # those of others are not looked at
        }
    )
    assert (launch.source, launch.rank, launch.size) == ("opensmp run", 1, 2)
    assert (launch.local_rank, launch.local_size) == (1, 2)
    assert (launch.meeting, launch.num_meeting_ports) == (("127.0.0.1", 4711), 1)
    assert (launch.token, launch.join_seconds, launch.addresses) == ("secret", 7.5, None)
    assert launch.has_secret
    assert launch.idle_seconds == 9


@pytest.mark.parametrize(
    ("job", "index", "rank"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_tf_config_counts_the_chief_first_and_brings_addresses(job, index, rank):
    launch = detect(tf_config(job, index))
    assert (launch.rank, launch.size) == (rank, 3)
    assert launch.addresses == ("a:2222", "b:2222", "c:2222")
    assert launch.meeting is not None
    assert launch.meeting[0] == "a"
    assert launch.meeting == detect(tf_config("chief", 0)).meeting
    assert launch.join_seconds == 300


def test_tf_config_of_a_parameter_server_takes_no_part():
    with pytest.raises(LaunchError, match="Parameter servers and evaluators"):
        detect(tf_config("ps", 0, {**CLUSTER, "ps": ["d:2222"]}))
    with pytest.raises(LaunchError, match="TF_CONFIG names no rank"):
        detect({"TF_CONFIG": "{"})


def test_torchrun_variables():
    launch = detect(TORCHRUN)
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size) == (1, 2, 1, 2)
    assert launch.meeting == ("node0", 29500)


def test_port_of_the_agent_of_torchrun_is_left_to_it():
    assert detect({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).meeting == ("node0", 29501)


def test_torchrun_variables_without_a_master_say_what_is_missing():
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT as well"):
        detect({"RANK": "1", "WORLD_SIZE": "2"})


def test_open_mpi_on_one_machine_derives_a_port_from_the_job():
    here = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    launch = detect(here)
    assert (launch.source, launch.rank, launch.size, launch.local_rank) == ("Open MPI", 3, 4, 3)
    assert launch.meeting is not None
    assert launch.meeting[0] == "127.0.0.1"
    assert 20000 <= launch.meeting[1] < 30000
    assert launch.num_meeting_ports > 1
    other = detect({**here, "PMIX_NAMESPACE": "job8"})
    assert (other.meeting, other.token) != (launch.meeting, launch.token)


def test_open_mpi_on_several_machines_needs_a_master():
    with pytest.raises(LaunchError, match="-x MASTER_ADDR=node0"):
        detect(OPEN_MPI)
    master = {"MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
    assert detect({**OPEN_MPI, **master}).meeting == ("node0", 29400)


def test_service_of_the_vendor_names_the_hosts():
    launch = detect({**OPEN_MPI, "SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-2"})
    assert launch.meeting is not None
    assert launch.meeting[0] == "algo-1"
    assert launch.num_meeting_ports > 1


def test_mpich_has_local_ranks_of_its_own_kind():
    launch = detect(
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    )
    assert (launch.source, launch.rank, launch.size) == ("MPICH", 1, 2)
    assert (launch.local_rank, launch.local_size) == (1, 2)


def test_slurm_step_meets_on_its_first_node():
    launch = detect(
        {
            "SLURM_PROCID": "2",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NODELIST": "node[07-08]",
            "SLURM_JOB_ID": "99",
            "SLURM_STEP_ID": "1",
        }
    )
    assert (launch.source, launch.rank, launch.size, launch.local_rank) == ("Slurm", 2, 4, 0)
    assert launch.meeting is not None
    assert launch.meeting[0] == "node07"
    assert launch.token == "slurm 99.1"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"RANK": "2"}, "rank 2 of 2 processes"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"OPENSMP_IDLE_SECONDS": "soon"}, "OPENSMP_IDLE_SECONDS .* Received: soon"),
        ({"OPENSMP_IDLE_SECONDS": "-1"}, "OPENSMP_IDLE_SECONDS .* Received: -1"),
        ({"OPENSMP_IDLE_SECONDS": "nan"}, "OPENSMP_IDLE_SECONDS .* Received: nan"),
    ],
)
def test_impossible_numbers_are_refused(change, part):
    with pytest.raises(LaunchError, match=part):
        detect({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"OPENSMP_RUN_RANK": "0"}, ["OPENSMP_RUN_SIZE is not set"]),
        (
            {"OPENSMP_RUN_RANK": "0", "OPENSMP_RUN_SIZE": "2", "OPENSMP_RUN_MEETING": "here"},
            ["OPENSMP_RUN_MEETING is 'here'", "host:port"],
        ),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE is not set"]),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, ["MASTER_PORT is '99999'", "a free port"]),
        ({**TORCHRUN, "MASTER_PORT": "x"}, ["MASTER_PORT is 'x'"]),
        ({**TORCHRUN, "OPENSMP_RUN_JOIN_SECONDS": "abc"}, ["OPENSMP_RUN_JOIN_SECONDS", "abc"]),
        ({**TORCHRUN, "OPENSMP_RUN_JOIN_SECONDS": "nan"}, ["OPENSMP_RUN_JOIN_SECONDS", "nan"]),
        (tf_config("worker", 0, {"worker": ["a", "b:1"]}), ["TF_CONFIG", "host:port"]),
        (tf_config("worker", 0, {"worker": "a:1,b:1"}), ["TF_CONFIG", "no list"]),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, ["MPICH: PMI_RANK is 'x'"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["may run on several machines"]),
    ],
)
def test_broken_variables_are_named(environ, parts, monkeypatch):
    with pytest.raises(LaunchError) as caught:
        detect(environ)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "9" * 5000},
        {"WORLD_SIZE": "1" + "0" * 9},
        {"RANK": "\u0661"},
        {"MASTER_PORT": "9" * 5000},
        {"MASTER_ADDR": "a..b"},
        {"MASTER_ADDR": "\udcff"},
        {"OPENSMP_IDLE_SECONDS": "inf"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "3"},
        {"LOCAL_WORLD_SIZE": "0"},
    ],
    ids=shown,
)
def test_odd_texts_of_variables_are_refused(change):
    with pytest.raises(LaunchError):
        detect({**TORCHRUN, **change})


def test_all_faults_of_an_environment_come_at_once():
    faulty = {
        "RANK": "one",
        "WORLD_SIZE": "-2",
        "MASTER_PORT": "x",
        "MASTER_ADDR": "a b",
        "OPENSMP_RUN_JOIN_SECONDS": "soon",
        "OPENSMP_IDLE_SECONDS": "never",
    }
    with pytest.raises(LaunchError, match="the variables have 6 faults") as caught:
        detect({**TORCHRUN, **faulty})
    for name in faulty:
        assert f". {name} is " in str(caught.value)


@pytest.mark.parametrize(
    "hosts", ["[" * 100_000, '{"a": 1}', "[1, 2]", '["a b", "c"]', "algo-1"], ids=shown
)
def test_hosts_of_the_service_that_are_none_are_named(hosts):
    with pytest.raises(LaunchError, match="SM_HOSTS is"):
        detect({**OPEN_MPI, "SM_HOSTS": hosts})


def test_bytes_that_are_no_text_do_not_keep_a_run_from_its_name():
    launch = detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": "\udcff"})
    assert launch.token.encode()
    assert launch.token != detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": "\udcfe"}).token


def test_node_list_of_slurm_that_is_none_is_named():
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(LaunchError, match=r"SLURM_JOB_NODELIST is .*brackets do not fit"):
        detect({**slurm, "SLURM_JOB_NODELIST": "[" * 50_000})


def test_variables_of_two_launchers_must_agree():
    left_over = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    of_mpich = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
    message = "contradict each other: MPICH rank 1 of 2, RANK and WORLD_SIZE rank 0 of 2"
    with pytest.raises(LaunchError, match=message):
        detect({**of_mpich, **left_over})
    with pytest.raises(LaunchError, match="TF_CONFIG rank 0 of 3"):
        detect({**of_mpich, **tf_config("chief", 0)})
    assert detect({**of_mpich, **left_over, "RANK": "1"}).rank == 1


def test_srun_that_gives_the_numbers_of_mpich_is_srun():
    environ = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "PMI_RANK": "1",
        "PMI_SIZE": "4",
    }
    launch = detect(environ)
    assert (launch.source, launch.rank, launch.meeting[0]) == ("Slurm", 1, "node07")


def test_runs_of_torchrun_are_told_apart():
    one, other = (detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": name}) for name in ("a", "b"))
    assert one.token != other.token
    assert detect(TORCHRUN).token == detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}).token


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        (TORCHRUN, "RANK"),
        (OPEN_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_child_of_a_rank_is_not_that_rank(environ, variable):
    inherited = dict(environ)
    claim(detect(environ), inherited, 7)
    claim(detect(inherited), inherited, 7)  # once more in the same process
    with pytest.raises(LaunchError, match=f"process 7 is rank .*process 8.*env -u {variable} "):
        claim(detect(inherited), inherited, 8)


def test_child_of_a_rank_may_be_a_rank_of_another_run():
    inherited = dict(TORCHRUN)
    claim(detect(TORCHRUN), inherited, 7)
    inherited["MASTER_PORT"] = "29600"
    claim(detect(inherited), inherited, 8)
    with pytest.raises(LaunchError, match="process 8 is rank 1 of this run already"):
        claim(detect(inherited), inherited, 9)


@pytest.mark.parametrize("token", ["", " ", None])
def test_the_name_of_a_run_is_no_secret(token):
    launch = detect({**TORCHRUN, **({} if token is None else {"OPENSMP_RUN_TOKEN": token})})
    assert (launch.token, launch.has_secret) == (detect(TORCHRUN).token, False)
    secret = detect({**TORCHRUN, "OPENSMP_RUN_TOKEN": " 3f7a\n"})
    assert (secret.token, secret.has_secret) == ("3f7a", True)


def test_every_convention_has_a_row():
    modules = {path.stem for path in Path(conventions.__path__[0]).glob("[!_]*.py")}
    assert modules == {each.read.__module__.rpartition(".")[2] for each in LAUNCHERS}
