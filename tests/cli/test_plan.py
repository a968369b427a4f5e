from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from helpers import output_of, run_python

from opensmp import _private
from opensmp.cli import main
from opensmp.compiler.plan.plan import Plan

MODELS = """
import keras
from keras import layers
import opensmp as smp

def mlp(units=32, num_layers=4):
    stack = [layers.Dense(units, activation="relu") for _ in range(num_layers)]
    return keras.Sequential([keras.Input([32]), *stack, layers.Dropout(0.5), layers.Dense(10)])

def needy(units, depth):
    return mlp(units, depth)

def number():
    return 3

def normalised():
    stack = [layers.Dense(32), layers.BatchNormalization(name="norm"), layers.Dense(32)]
    return keras.Sequential([keras.Input([32]), *stack])

def broken():
    raise RuntimeError("no data here")

def unfinished():
    mlp()
    raise RuntimeError("no more layers")

def compiled():
    model = mlp()
    model.compile("adam", "mse")
    return model

def open_shape():
    inputs = keras.Input([None], dtype="int32", name="tokens")
    x = layers.Embedding(100, 8)(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))

class Net(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(8), layers.Dense(8)

    def call(self, x):
        with smp.partition(0):
            x = self.a(x)
        with smp.partition(1):
            return self.b(x)

value = 3
"""


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "cli_models.py").write_text(MODELS)
    yield
    sys.modules.pop("cli_models", None)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("plan ...")`: (exit status, what was printed, what went to the error stream)."""

    def call(line: str, columns: int = 140) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opensmp", *line.split()])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_plan_is_printed_written_drawn_and_explained(run, tmp_path):
    status, out, _ = run(
        "plan cli_models:mlp --partitions 2 --microbatches 4 --batch 32 --device-memory 1GiB "
        "--output plan.json --picture plan.svg --explain"
    )
    assert status == 0
    for part in (
        "Plan of sequential",
        "over 2 partitions: 4 microbatches, pipeline 'interleaved', optimize 'memory'",
        "B to 1",
        "predicted step",
        "Cut 0 | 1, between",
        "the limit is 1 GiB",
        'use it: smp.init({"partitions": 2, "microbatches": 4, "plan": "plan.json"})',
    ):
        assert part in out
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.num_partitions == 2
    assert plan.settings.machine.memory_bytes == 2**30
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_keys_that_a_plan_does_not_depend_on_go_into_the_call_that_uses_it(run):
    status, out, err = run(
        "plan cli_models:mlp --partitions 2 --microbatches 4 --batch 32 --output plan.json "
        "--devices cpu --transport collective --check-finite --auto-partition --horovod "
        "--processes-per-replica 2 --optimize speed"
    )
    assert status == 0, err
    use = next(line for line in out.splitlines() if line.startswith("use it: "))
    assert use == (
        'use it: smp.init({"partitions": 2, "microbatches": 4, "optimize": "speed", '
        '"plan": "plan.json", "horovod": True, "devices": "cpu", "processes_per_replica": 2, '
        '"transport": "collective", "check_finite": True})'
    )


def test_the_call_that_uses_a_plan_recomputes_as_the_plan_does(run):
    status, out, _ = run(
        "plan cli_models:mlp --partitions 2 --microbatches 4 --batch 32 --device-memory 1GiB "
        "--recompute auto --output plan.json"
    )
    assert status == 0
    assert '"recompute": "auto", "plan": "plan.json"})' in out


def test_written_plan_is_used_by_a_script(run, tmp_path, smp_init):
    status, _, err = run(
        "plan cli_models:mlp --partitions 2 --microbatches 2 --batch 8 --output plan.json"
    )
    assert status == 0, err
    data = json.loads((tmp_path / "plan.json").read_text())
    first, *others = [label for label in data["layers"] if label.startswith("dense")]
    data["layers"] = {"*": 1, **dict.fromkeys([first], 0), **dict.fromkeys(others, 1)}
    (tmp_path / "plan.json").write_text(json.dumps(data))

    here = smp_init({"partitions": 2, "microbatches": 2, "plan": "plan.json"})
    import cli_models

    import opensmp as smp

    model = smp.DistributedModel.from_keras(cli_models.mlp())
    model(tf.zeros([4, 32]))
    assert model.plan.source == "plan.json"
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    places = [kernel.value.device.endswith(here.devices[0]) for kernel in kernels]
    assert places == [True, False, False, False, False]


def test_partitions_in_several_pieces_are_planned(run):
    status, _, err = run(
        "plan cli_models:mlp --partitions 2 --microbatches 2 --batch 8 --output plan.json "
        "--pieces-per-partition 2"
    )
    assert status == 0, err
    assert Plan.load("plan.json").settings.pieces == 2


def test_recommendation_ranks_and_plans_for_the_best(run):
    status, out, _ = run("plan cli_models:mlp --partitions 3 --batch 16 --recommend")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("1 ")]
    partitions, microbatches = rows[0][1:3]
    assert "Configurations, the best one first (no memory limit)" in out
    assert re.search(rf"over {partitions} partitions?: {microbatches} microbatch", out)


def test_recommendation_fits_80_columns_and_says_what_was_simulated(run):
    status, out, _ = run(
        "plan cli_models:needy --arg units=1024 --arg depth=8 --partitions 2 --batch 64 "
        "--recommend",
        columns=80,
    )
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "zero_bubble" in out
    assert "with its schedule simulated: step " in out


def test_a_model_that_normalises_gets_no_microbatches_of_one_row(run):
    status, out, _ = run("plan cli_models:normalised --partitions 2 --batch 8 --recommend")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+ +\d+ ", line)]
    assert {int(row[2]) for row in rows} == {1, 2, 4}
    assert "without microbatches of one row, which layer 'norm' cannot normalise" in out


def test_distributed_model_is_planned_without_init(run):
    keras.utils.clear_session()  # so that it is named "net", not "net_1"
    status, out, err = run("plan cli_models:Net --partitions 2 --batch 4 --input 16")
    assert status == 0, err
    assert "Plan of net over 2 partitions" in out


def test_terminal_of_80_columns_gets_a_table_that_fits(run):
    status, out, _ = run("plan cli_models:mlp --partitions 2 --batch 4", columns=80)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80


def test_shape_that_the_model_leaves_open_is_given(run):
    line = "plan cli_models:open_shape --partitions 1 --batch 4"
    status, _, err = run(line)
    assert status == 1
    assert "'tokens' has the shape (None, None)" in err
    assert run(f"{line} --input 16")[0] == 0


def test_arguments_reach_the_factory(run, tmp_path):
    assert (
        run(
            "plan cli_models:needy --arg units=64 --arg depth=2 --partitions 1 --batch 4 "
            "--output plan.json"
        )[0]
        == 0
    )
    assert len([k for k in Plan.load("plan.json").layers if k.startswith("dense")]) == 3


MISUSES = [
    ("cli_models:mlpp --batch 8", ["has no attribute 'mlpp'", "did you mean 'mlp'?"]),
    ("no_such_module:mlp --batch 8", ["There is no module 'no_such_module'"]),
    ("cli_models:needy --batch 8", ["'units'", "--arg units=... --arg depth=..."]),
    ("cli_models:mlp --batch 8 --arg size=3", ["'size'", "Its parameters are (units=32"]),
    ("cli_models:number --batch 8", ["gave a value of type builtins.int", "a keras.Model"]),
    ("cli_models:value --batch 8", ["is a value of type int", "returns a keras.Model"]),
    ("cli_models:broken --batch 8", ["RuntimeError: no data here"]),
    ("cli_models:compiled --batch 8", ["an optimizer, compile()", "--allocate"]),
    ("cli_models:Net --batch 8", ["does not know the shape of its inputs", "--input"]),
    ("cli_models:mlp --batch 8 --input 31", ["--input 31 contradicts the shape"]),
    (
        "cli_models:mlp --batch 30 --microbatches 4",
        ["--batch 30", "--microbatches 4", "choose 3 or 5 microbatches", "a batch of 32"],
    ),
    ("cli_models:mlp --batch 8 --device-memory 16G", ["--device-memory", "16GiB", "16GB"]),
    ("cli_models:mlp --batch 8 --device-flops -1", ["--device-flops", "from 1 to 1e+24"]),
    (
        "cli_models:mlp --batch 8 --measure --device-flops 1e9",
        ["--measure takes measured times", "leave out these, or --measure"],
    ),
    ("cli_models:mlp --batch 8 --pipeline simpel", ["pipeline", "did you mean 'simple'?"]),
    ("cli_models:mlp --batch 8 --optimize size", ["optimize", "'memory' or 'speed'"]),
    (
        "cli_models:mlp --batch 8 --recommend --pieces-per-partition 2",
        ["--recommend compares plans of one piece per partition"],
    ),
    ("cli_models:mlp --batch 8 --picture plan.gif", ["plan.gif", ".svg, .png, .pdf"]),
    ("cli_models:mlp --batch 8 --output no/plan.json", ["there is no directory", "/no"]),
    (
        "cli_models:mlp --batch 8 --device-memory 1KiB",
        [
            "no cut into 2 partitions was found that fits into 1 KiB per device",
            "too much",
            "What would help: more partitions, though not even 16 are enough alone",
            "a smaller microbatch",
            "recomputing in the backward pass",
        ],
    ),
    (
        "cli_models:mlp --batch 8 --device-memory 1KiB --recommend",
        ["No configuration fits 1 KiB per device", "too much"],
    ),
]


@pytest.mark.parametrize(("line", "parts"), MISUSES, ids=lambda value: str(value)[:60])
def test_misuse_gets_a_message_without_a_traceback(line, parts, run):
    status, _, err = run(f"plan {line} --partitions 2")
    # Wrong options name the command, and have the exit code of wrong usage.
    assert status == (2 if err.startswith("opensmp plan: ") else 1)
    assert err.startswith(("opensmp: ", "opensmp plan: "))
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_faults_of_the_options_come_at_once(run):
    status, _, err = run(
        "plan cli_models:mlp --partitions 2 --batch 7 --microbatches 2 --pipeline x --picture a.b "
        "--device-memory 3 --device-flops nan --link-bandwidth fast --input 3x --input 0 --arg x"
    )
    assert status == 2
    options = ("--batch 7", "pipeline", "--picture 'a.b'", "--device-flops: received nan")
    for part in (*options, "--link-bandwidth: received 'fast'", "'3x'", "'0'", "--arg: expected"):
        assert part in err


def test_large_batch_that_the_microbatches_do_not_divide_is_refused_at_once(run):
    status, _, err = run("plan cli_models:mlp --partitions 2 --batch 999999937 --microbatches 1000")
    assert status == 2
    assert "choose 1 or 999999937 microbatches" in err


def test_model_with_an_optimizer_is_planned_with_its_memory(run):
    status, out, _ = run("plan cli_models:compiled --partitions 2 --batch 8 --allocate")
    assert status == 0
    assert "Plan of sequential" in out


@pytest.mark.parametrize("factory", ["mlp", "unfinished"])
def test_dry_run_leaves_no_variable_waiting(run, factory):
    run(f"plan cli_models:{factory} --partitions 2 --batch 8")
    # Keras gives memory to all that are on its list when it has made another layer.
    assert _private.take_pending_variables() == []


def test_model_of_100_gb_is_planned_in_little_memory():
    code = textwrap.dedent(
        """
        import resource, sys
        import keras
        from keras import layers
        import opensmp
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def build():
            stack = [layers.Dense(20_000) for _ in range(64)]
            return keras.Sequential([keras.Input([20_000]), *stack])

        sys.modules["huge"] = sys.modules["__main__"]
        sys.argv = "opensmp plan huge:build --partitions 8 --microbatches 8 --batch 32".split()
        sys.argv += ["--device-memory", "80GiB", "--output", "plan.json"]
        from opensmp.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print("grown by", grown // 1024, "MiB")
        """
    )
    out = output_of(code)
    plan = Plan.load("plan.json")
    assert sum(row.parameter_bytes for row in plan.rows) == 64 * (20_000**2 + 20_000) * 4
    assert max(plan.prediction.peak_bytes) < 80 * 2**30
    assert int(out.rsplit("grown by ", 1)[1].split()[0]) < 300


def test_measured_times_take_the_place_of_predicted_ones_and_are_kept(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = "plan cli_models:mlp --partitions 2 --batch 8 --microbatches 2 --output plan.json"
    assert run(line)[0] == 0
    estimated = json.loads(Path("plan.json").read_text())
    status, out, _ = run(f"{line} --measure --link-bandwidth 1GB")
    assert status == 0
    assert "measured: " in out
    measured = json.loads(Path("plan.json").read_text())
    assert measured["settings"]["machine"] != estimated["settings"]["machine"]
    assert measured["costs"]["forward_seconds"] != estimated["costs"]["forward_seconds"]
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.json") if "opensmp" in path.parts}
    assert len(kept) == 2  # the machine, and the pieces of the model
    assert run(f"{line} --measure --link-bandwidth 2GB")[0] == 0
    again = json.loads(Path("plan.json").read_text())
    assert again["costs"]["forward_seconds"] == measured["costs"]["forward_seconds"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert measured["settings"]["machine"]["transfer_bytes_per_second"] == 1e9
    assert run(f"{line} --measure --recommend")[0] == 0


def test_measured_times_that_cannot_be_kept_are_used(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    line = "plan cli_models:mlp --partitions 2 --batch 8 --measure"
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert run(line)[0] == 0


def test_plan_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys; from opensmp.cli import main; sys.argv = 'opensmp plan cli_models:mlp "
        "--partitions 3 --microbatches 2 --batch 8 --output plan.json'.split(); main()"
    )
    files = []
    for seed in ("1", "2"):
        output_of(code, env={"PYTHONHASHSEED": seed})
        files.append((tmp_path / "plan.json").read_bytes())
    assert files[0] == files[1]


def test_command_lists_its_options():
    code = "import sys; sys.argv = ['opensmp', 'plan', '--help']; import opensmp.__main__"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for option in ("--partitions", "--device-memory", "--recommend", "--picture"):
        assert option in done.stdout
