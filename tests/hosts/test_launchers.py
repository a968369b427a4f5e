"""Other launchers than `opensmp run`, over machines that are network namespaces of this one."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hosts.test_launching import stand_in
from hosts.test_machines import PROGRAM, STEPS, results, trains_as_plain_keras
from machines import machines_or_skip
from patience import patient
from processes import environ_of_tests

CONFIG = json.dumps({"partitions": 2, "microbatches": 2})
SCRIPT = [sys.executable, PROGRAM, CONFIG, STEPS]
AS_ROOT = {
    f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1"
    for prefix in ("OMPI", "PRTE")
    for suffix in ("", "_CONFIRM")
}
TWO_ON_EACH = [[0, 2], [1, 2], [0, 2], [1, 2]]


def find(name: str) -> str | None:
    """A launcher of this environment, or one on the path."""
    path = os.environ.get("PATH", os.defpath)
    folders = [str(Path(sys.executable).parent), path, "/usr/sbin", "/usr/local/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def check(processes):
    found = results(processes)
    trains_as_plain_keras(found, 2 * 2, layers=3)
    assert [each["local"] for each in found] == TWO_ON_EACH


@pytest.mark.skipif(find("mpiexec.hydra") is None, reason="MPICH is not installed")
def test_mpich_over_two_machines():
    with machines_or_skip(2) as machines:
        first, second = machines.names
        command = [find("mpiexec.hydra"), "-launcher", "ssh", "-launcher-exec", stand_in(machines)]
        command += ["-hosts", f"{first},{second}", "-ppn", 2, "-n", 4]
        command += ["-genv", "MASTER_ADDR", first, "-genv", "MASTER_PORT", 29400]
        environ = environ_of_tests({"OPENSMP_RUN_TOKEN": "x"})
        check([machines.start(0, [*command, *SCRIPT], environ)])


@pytest.mark.skipif(find("prterun") is None, reason="Open MPI 5 is not installed")
def test_open_mpi_over_two_machines():
    with machines_or_skip(2) as machines:
        first, second = machines.names
        command = [find("prterun"), "--personality", "ompi"]
        command += ["--prtemca", "plm_ssh_agent", stand_in(machines)]
        command += ["--prtemca", "prte_launch_agent", find("prted")]
        command += ["--host", f"{first}:2,{second}:2", "-n", 4]
        for name, value in {
            "MASTER_ADDR": first,
            "MASTER_PORT": "29400",
            "OPENSMP_RUN_TOKEN": "x",
        }.items():
            command += ["-x", f"{name}={value}"]
        check([machines.start(0, [*command, *SCRIPT], environ_of_tests(AS_ROOT))])


# Its wheel is large, and part of no extra: the test runs where somebody has installed it.
@pytest.mark.skipif(find("torchrun") is None, reason="torch is not installed")
def test_torchrun_over_two_machines():
    with machines_or_skip(2) as machines:
        processes = []
        for node in (0, 1):
            command = [find("torchrun"), "--nnodes", 2, "--node-rank", node]
            command += ["--nproc-per-node", 2, "--master-addr", machines.names[0]]
            command += ["--master-port", 29400, "--no-python"]
            environ = environ_of_tests({"OPENSMP_RUN_TOKEN": "x"})
            processes.append(machines.start(node, [*command, *SCRIPT], environ))
        check(processes)


SLURM = """
ClusterName=tests
SlurmctldHost={first}
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={first},{second} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "sinfo")


def start_slurm(machines, environ):
    """Starts Slurm's daemons on all machines, and waits until both nodes take jobs."""
    folder, (first, second) = machines.folder, machines.names
    (folder / "munge").mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    config.write_text(SLURM.format(first=first, second=second, folder=folder))
    (folder / "cgroup.conf").write_text(
        f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n"
    )
    (folder / "cgroup").mkdir()
    for name in machines.names:
        (folder / f"spool-{name}").mkdir()
    environ["SLURM_CONF"] = str(config)
    munge = [find("munged"), "--foreground", "--force", f"--key-file={key}"]
    for name in ("socket", "pid-file", "log-file", "seed-file"):
        munge.append(f"--{name}={folder}/munge/{name.removesuffix('-file')}")
    machines.start(0, munge, environ)
    machines.start(0, [find("slurmctld"), "-D", "-f", config], environ)
    for node in (0, 1):
        machines.start(node, [find("slurmd"), "-D", "-f", config], environ)
    latest = time.monotonic() + patient(30.0)
    while True:
        asked = [*machines.prefix(0), f"exec {find('sinfo')} -h -o %t"]
        done = subprocess.run(asked, env=environ, capture_output=True, text=True, check=False)
        if done.stdout.split() == ["idle"]:
            return
        logs = "\n".join(p.read_text(errors="replace") for p in sorted(folder.glob("**/*log")))
        assert time.monotonic() < latest, f"{done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.2)


# Of Debian's packages slurmctld, slurmd, slurm-client and munge.
@pytest.mark.skipif(not all(map(find, DAEMONS)), reason="Slurm and MUNGE are not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons start jobs as root only")
def test_slurm_over_two_machines():
    with machines_or_skip(2) as machines:
        environ = environ_of_tests()
        start_slurm(machines, environ)
        command = [find("srun"), "-N", 2, "-n", 4, "--ntasks-per-node", 2, "--overcommit"]
        check([machines.start(0, [*command, *SCRIPT], environ)])


RAY_TRAIN = """
def main():
    import keras, numpy as np
    import opensmp as smp

    smp.init({"partitions": 2, "microbatches": 2})
    inputs = keras.Input((1,))
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Model(inputs, dense(keras.layers.Activation("linear")(inputs)))
    model = smp.DistributedModel.from_keras(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.ones((4, 1), "float32")
    history = model.fit(x, 3 * x, batch_size=4, epochs=3, verbose=0)
    return smp.rank(), history.history["loss"]
"""
RAY_LOSSES = [4.0, 4.0 * 0.8**2, 4.0 * 0.8**4]  # (3 - w)^2, and w comes closer by a fifth each time


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_the_recipe_for_ray(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
    recipe = page[page.index("import secrets") :].split("```")[0]
    recipe = recipe.replace("num_gpus=1", "num_cpus=1").replace("range(4)", "range(2)")
    (tmp_path / "recipe.py").write_text(recipe.replace("i, 4, host", "i, 2, host"))
    (tmp_path / "train.py").write_text(RAY_TRAIN)
    environ = environ_of_tests()
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=patient(120.0),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (first, losses), (second, others) = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert (first, second) == (0, 1)
    assert losses == others
    np.testing.assert_allclose(losses, RAY_LOSSES, rtol=1e-5)
