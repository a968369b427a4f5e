from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import launch
from typer.testing import CliRunner

from opensmp.cli import app
from opensmp.cli.tuning.trials import Script, _reason
from opensmp.config import TRIAL_VARIABLE, Config
from opensmp.errors import ConfigError, LaunchError
from opensmp.execution.profiling.tuning.report import table
from opensmp.execution.profiling.tuning.trial import (
    Candidate,
    Measured,
    Outcome,
    Trial,
    current,
    settings,
)

FIT = """
import sys
import keras, numpy as np
import opensmp as smp
from opensmp.distributed import world
smp.init({"partitions": 2, "microbatches": 2})
if world.current("test").config.pipeline == "zero_bubble":
    raise ValueError("nothing for this schedule")
layers = [keras.layers.Dense(16, activation="relu") for _ in range(4)]
model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((8,)), *layers]))
model.compile("sgd", "mse")
try:
    model.fit(np.ones((640, 8)), np.ones((640, 16)), batch_size=16, verbose=2)
finally:
    open(sys.argv[1], "w").close()
"""

STEP = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2})
model = smp.DistributedModel.from_keras(keras.Sequential(
    [keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4)]))
optimizer = keras.optimizers.SGD()

@smp.step
def forward_backward(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss

@tf.function
def train(x):
    gradients, loss = forward_backward(x)
    gradients = [gradient.accumulate() for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss.reduce_mean()

for _ in range(20):
    train(tf.ones((8, 8)))
"""


def tune(folder: Path, script: str, *options: str) -> Any:
    return launch(
        script,
        ["--steps", "1", "--output", folder / "tuned.json", *options],
        args=[folder / "left.txt"],
        environ={"COLUMNS": 80},
        command=(sys.executable, "-m", "opensmp", "tune"),
    )


def measured(seconds: float = 0.5, **config: Any) -> Measured:
    values = Config.resolve({"partitions": 2, **config}).to_dict()
    return Measured(seconds, values, ["partitions", *config])


class TestScripts:
    def test_fit_in_one_process(self, tmp_path):
        done = tune(tmp_path, FIT, "--candidates", "2")
        assert done.code == 0, done.stderr
        assert "as in the script" in done.stdout
        assert "failed with exit code 1: ValueError: nothing for this schedule" in done.stdout
        assert max(map(len, done.stdout.splitlines()[:7])) <= 80
        assert not (tmp_path / "left.txt").exists()
        found = json.loads((tmp_path / "tuned.json").read_text())
        assert found["partitions"] == 2
        assert found["pipeline"] != "zero_bubble"
        assert Config.resolve(tmp_path / "tuned.json") == Config.resolve(found)

    def test_a_step_in_two_processes(self, tmp_path):
        done = tune(tmp_path, STEP, "-n", "2", "--candidates", "1")
        assert done.code == 0, done.stderr
        lines = done.stderr.splitlines()
        assert len([line for line in lines if "ms a step" in line]) == 3, done.stderr
        assert "transport=collective" in done.stdout
        assert json.loads((tmp_path / "tuned.json").read_text()).keys() == {
            "partitions",
            "microbatches",
            "pipeline",
            "transport",
            "pieces_per_partition",
        }

    def test_a_script_that_fails_is_shown(self, tmp_path):
        done = tune(tmp_path, "import opensmp\nprint('here')\nraise SystemExit('no data')")
        assert done.code == 1
        assert "nothing could be measured with the settings of the script" in done.stderr
        assert "  here\n  no data" in done.stderr
        assert not (tmp_path / "tuned.json").exists()

    def test_missing_files_are_found_before_anything_runs(self, tmp_path):
        done = CliRunner().invoke(app, ["tune", str(tmp_path / "nope.py")])
        assert isinstance(done.exception, LaunchError)
        assert done.exception.exit_code == 2
        assert "opensmp tune: there is no file" in str(done.exception)


class TestTrials:
    def test_a_trial_reaches_the_script(self):
        trial = Trial("result.json", 3, {"microbatches": 4}, 6)
        assert current({TRIAL_VARIABLE: trial.to_text()}) == trial
        assert current({}) is None

    @pytest.mark.parametrize("text", ["{", "[]", '{"steps": 3}', '{"unknown": 1}'])
    def test_a_damaged_variable_is_refused(self, text):
        with pytest.raises(LaunchError, match="Remove the variable"):
            current({TRIAL_VARIABLE: text})

    def test_what_is_tried_comes_before_the_script(self):
        tried = {"microbatches": 8, "pipeline": "simple"}
        config = Config.resolve({"partitions": 2, "microbatches": 4}, tried=tried)
        assert (config.partitions, config.microbatches, config.pipeline) == (2, 8, "simple")

    def test_a_result_is_read_as_it_was_written(self, tmp_path):
        path = str(tmp_path / "result.json")
        assert Measured.read(path) is None
        wanted = measured()._replace(candidates=[Candidate({"microbatches": 4}, 0.25)], note="why")
        wanted.write(path)
        assert Measured.read(path) == wanted

    def test_the_script_gets_its_arguments(self):
        command = Script("train.py", ("--epochs", "3"), 4).command()
        assert command[-4:] == ["--", "train.py", "--epochs", "3"]
        assert command[command.index("-n") + 1] == "4"
        assert Script("package.train", module=True).command()[-3:] == ["-m", "--", "package.train"]

    def test_reasons_are_the_errors_themselves(self):
        log = "Epoch 1\nTraceback (most recent call last):\n  File x\n"
        log += "[0] ValueError: first\n[0] second\n"
        assert _reason(log, 1, 5, 9.0) == "failed with exit code 1: ValueError: first second"
        assert "8 training steps" in _reason("", 0, 5, 9.0)
        assert "stopped after 9 s" in _reason("", None, 5, 9.0)


def test_settings_are_what_was_given_and_what_was_tried():
    assert settings(measured(microbatches=4)) == {
        "partitions": 2,
        "microbatches": 4,
        "pipeline": "interleaved",
        "pieces_per_partition": 1,
    }
    assert settings(measured()._replace(size=2))["transport"] == "auto"


def test_the_table_is_in_the_order_of_times():
    slow, fast = Outcome(Candidate({}), measured(2.0)), Outcome(Candidate({"microbatches": 12}))
    fast = fast._replace(measured=measured(0.5))
    failed = Outcome(Candidate({"pieces_per_partition": 2}), error="failed: why")
    made = table([slow, fast, failed], fast)
    cells = [list(column.cells) for column in made.columns]
    assert [str(cell) for cell in cells[0]] == ["microbatches=12", "as in the script", "pieces=2"]
    assert [str(cell) for cell in cells[3]] == ["4.00 x", "1.00 x", "-"]
    assert [str(cell) for cell in cells[4]] == ["best", "", "failed"]


class TestFiles:
    def test_options_come_before_a_file(self, tmp_path):
        path = tmp_path / "tuned.json"
        path.write_text('{"partitions": 2, "microbatches": 16}')
        script = (
            "import opensmp as smp\nfrom opensmp.distributed import world\nsmp.init()\n"
            "config = world.current('test').config\nprint(config.partitions, config.microbatches)"
        )
        done = launch(script, ["--config", path, "--microbatches", 12])
        assert done.stdout.split() == ["2", "12"], done.stderr

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            (None, "cannot be read (No such file or directory)"),
            ("{", "cannot be read"),
            ("[1]", "a dict such as"),
            ('{"microbatch": 3}', "this key is unknown; did you mean"),
            ('{"microbatches": 0}', "microbatches"),
        ],
    )
    def test_a_wrong_file_is_refused(self, tmp_path, text, fault):
        path = tmp_path / "tuned.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            Config.resolve(path)
        assert fault in str(caught.value)
