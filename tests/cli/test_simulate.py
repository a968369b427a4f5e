from __future__ import annotations

import ast
import json
import sys

import pytest
from helpers import run_python

from opensmp.cli import main
from opensmp.compiler.simulation.search import SEARCHED
from opensmp.config import Config

GPT = "--layers 24 --width 2048 --heads 16 --sequence 1024 --vocabulary 51200"

MODELS = """
import keras

def mlp(units=64):
    layers = [keras.layers.Dense(units, activation="relu") for _ in range(6)]
    return keras.Sequential([keras.Input([32]), *layers])

number = 3
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run("...")`: (exit status, what was printed, what went to the error stream)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "simulated_models.py").write_text(MODELS)

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opensmp", "simulate", *line.split()])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    yield call
    sys.modules.pop("simulated_models", None)


def test_a_transformer_is_simulated_within_80_columns(run):
    status, out, _ = run(
        f"{GPT} --batch 256 --nodes 2 --device a100 --partitions 8 --replicas 2 --microbatches 16 "
        "--recompute selective --shard-optimizer-state"
    )
    assert status == 0
    *lines, last = out.splitlines()
    assert max(map(len, lines)) <= 80
    for part in ("on 16 devices: 2 x 8 a100", "bubble   ", "bound by ", "0.78 of 312"):
        assert part in out
    settings = ast.literal_eval(last.removeprefix("use it: smp.init(").removesuffix(")"))
    config = Config.resolve(settings)
    assert (config.partitions, config.recompute) == (8, "selective")
    assert config.shard_optimizer_state


def test_json_has_all_of_it(run):
    status, out, _ = run(f"{GPT} --batch 64 --device h100 --partitions 4 --microbatches 8 --json")
    assert status == 0
    data = json.loads(out)
    assert data["settings"]["partitions"] == len(data["memory_bytes"]) == 4
    assert data["examples_per_second"] == pytest.approx(64 / data["seconds"])
    assert data["cluster"]["device"] == "h100"
    assert data["fits"] is True


def test_the_fastest_way_is_searched(run):
    line = f"{GPT} --batch 64 --device a100 --devices-per-node 4 --search"
    status, out, err = run(line)
    assert status == 0, err
    table, _, step = out.partition("Step of ")
    assert "schedule" in table
    assert all(len(row) <= 80 for row in table.splitlines())
    assert "…" not in table
    first = next(row for row in table.splitlines() if any(name in row for name in SEARCHED))
    assert first.split()[0] in step
    status, out, _ = run(f"{line} --json --pipeline zb_v --recompute full")
    steps = json.loads(out)["steps"]
    assert [s["seconds"] for s in steps] == sorted(s["seconds"] for s in steps)


def test_a_known_model_may_be_changed(run):
    line = "--model llama3-8b --sequence 1024 --batch 8 --device h100 --partitions 8 --json"
    status, out, _ = run(line)
    assert status == 0
    longer = json.loads(run(line.replace("1024", "2048"))[1])
    assert longer["seconds"] > json.loads(out)["seconds"]


def test_a_keras_model_is_planned_and_simulated(run):
    status, out, err = run(
        "simulated_models:mlp --arg units=128 --batch 64 --nodes 2 --devices-per-node 2 "
        "--device t4 --partitions 2 --replicas 2 --microbatches 4 --json"
    )
    assert status == 0, err
    data = json.loads(out)
    assert data["settings"]["partitions"] == 2
    assert data["parts"]["sum of gradients"] > 0
    assert data["examples"] == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch 8 --device h100", "name a Keras model or a --model such as llama3-70b"),
        (f"{GPT} --batch 8 --device h1000", "device is 'v100'"),
        (f"{GPT} --batch 8", 'Give the cluster a device, such as device="h100"'),
        (f"{GPT} --batch 9 --device t4 --microbatches 2", "a batch of 9 cannot be divided"),
        (f"{GPT} --batch 8 --device t4 --partitions 9", "need 9 devices, but the cluster has 8"),
        (f"{GPT} --batch 8 --device t4 --search --partitions 2", "leave these out, or --search"),
        (f"{GPT} --batch 8 --device t4 --search --pipeline auto", "'auto' cannot be searched"),
        (f"{GPT} --batch 8 --device t4 --input 3", "--input and --arg are for Keras models"),
        (f"{GPT} --batch 8 --device t4 --within nvlink9", "within: received 'nvlink9'"),
        ("--model llama --batch 8 --device t4", "there is no known model 'llama'"),
        (
            "simulated_models:mlp --batch 8 --device t4 --search --layers 3",
            "--layers is for Transformers, not for a Keras model; --search is for Transformers",
        ),
        ("simulated_models:mlp --batch 8", "Give the cluster a device"),
        ("simulated_models:number --batch 8 --device t4", "is no function that returns a model"),
        ("simulated_models:mlp --batch 8 --device t4 --microbatches 3", "cannot be divided"),
    ],
)
def test_faults_are_told_without_a_traceback(run, line, message):
    status, out, err = run(line)
    assert status in (1, 2)
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not out


def test_transformers_need_no_tensorflow():
    words = ["opensmp", "simulate", *GPT.split(), "--batch", "8", "--device", "h100", "--search"]
    program = f"""
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = None  # an import of it raises an error
from opensmp.cli import main
sys.argv = {words!r}
main()
"""
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")
    assert "use it: smp.init(" in result.stdout


def test_what_does_not_fit_fails_and_is_not_recommended(run):
    status, out, _ = run("--model llama3-70b --batch 8 --device a100 --partitions 2")
    assert status == 1
    assert "DOES NOT FIT" in out
    assert "use it" not in out
    status, out, _ = run("--model llama3-70b --batch 8 --device a100 --partitions 2 --json")
    assert (status, json.loads(out)["fits"]) == (1, False)
