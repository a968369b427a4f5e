"""Models that others have trained, as they ship in packages; scripts/setup.sh installs these."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pretrained import real_files
from processes import environ_of_tests
from turns import day

CASES = [(name, partitions) for name in real_files.FILES for partitions in (2, 4)]
EXPECTED = {
    "deeplc": {"inputs": 4, "parameters": 634_365},
    "fer": {"inputs": 1, "parameters": 58_423},
    "basic-pitch": {"inputs": 1, "parameters": 16_864},
}


def check(name, partitions):
    if real_files.path_of(name) is None:
        package = real_files.FILES[name][0]
        pytest.skip(f"the package {package} is not installed; scripts/setup.sh installs it")
    done = subprocess.run(
        [sys.executable, real_files.__file__, name, str(partitions)],
        # Its 1x1 convolutions of stride 2 can crash oneDNN's gradient.
        env=environ_of_tests({"TF_ENABLE_ONEDNN_OPTS": "0"}),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["inputs"] == EXPECTED[name]["inputs"]
    assert found["parameters"] == EXPECTED[name]["parameters"]
    assert found["partitions_with_weights"] == partitions
    assert found["output_difference"] < 1e-5
    assert found["trainable"] > 0
    assert found["trained"] >= found["trainable"] * 0.9
    assert found["weight_difference"] < 1e-4
    return found


@pytest.mark.parametrize(("name", "partitions"), [CASES[day() % len(CASES)]])
def test_today_a_real_file_computes_and_trains_split_as_it_does_whole(name, partitions):
    check(name, partitions)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "partitions"), CASES)
def test_real_files_compute_and_train_split_as_they_do_whole(name, partitions):
    check(name, partitions)
