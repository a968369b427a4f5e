from __future__ import annotations

import os

import pytest
from processes import check_ranks, launch

from opensmp.distributed.launch.cluster import bypass_proxies


@pytest.mark.parametrize("name", ["no_proxy", "no_grpc_proxy"])
def test_the_hosts_of_a_run_are_added_to_what_is_left_out_already(monkeypatch, name):
    for each in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "example.org")
    bypass_proxies(["node0", "[::1]", "node0"])
    assert os.environ[name] == "example.org,node0,::1,localhost,127.0.0.1"


def test_processes_meet_where_downloads_go_through_a_proxy():
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    script = "import opensmp as smp\nsmp.init()\nprint(smp.allgather(smp.rank()))\n"
    result = launch(script, ["-n", "2"], environ=proxies)
    assert result.stdout.strip() == "[0, 1]", result.stderr


def test_program_that_a_rank_starts_is_told_at_once_that_it_is_no_rank():
    script = """
    import os
    import subprocess
    import sys
    import opensmp as smp
    smp.init()
    if smp.rank() == 1:
        for dropped in ([], ["-u", "OPENSMP_RUN_RANK"]):
            child = [sys.executable, "-c", "import opensmp as smp; smp.init(); print(smp.size())"]
            done = subprocess.run(["env", *dropped, *child], capture_output=True, text=True)
            print(done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1])
    smp.barrier()
    """
    refused, alone = check_ranks(script, 2, seconds=500, join_seconds=2000, fresh=True)[1].lines
    assert refused.startswith("1 opensmp.errors.LaunchError: smp.init: process ")
    assert "is rank 1 of this run already" in refused
    assert alone == "0 1"
