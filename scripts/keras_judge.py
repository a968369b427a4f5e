"""Keras' own tests of its trainer and callbacks as the judge of split models.

    python scripts/keras_judge.py                    # all, as a table; takes minutes
    python scripts/keras_judge.py --write            # the same into docs/keras-tests.md
    python scripts/keras_judge.py callbacks/early_stopping_test.py

The tests are those in the installed Keras. They run twice: as they are, and with every model
that is compiled, fitted, evaluated or asked for predictions turned into an
`smp.DistributedModel` over two partitions and two microbatches, in place, so that all that a
test does with it afterwards is done with a split model. What fails both times is no fault of
ours. The exit code is 1 if a test fails for which `WHY` has no reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "keras-tests.md"
CONFIG = {"partitions": 2, "microbatches": 2}
SPLIT = "KERAS_JUDGE_SPLITS"
OUTCOMES = "KERAS_JUDGE_OUTCOMES"
METHODS = (
    "compile",
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
)

COUNTS_CALLS = "counts the calls of a layer, and each microbatch is one"
WHY: dict[str, str] = {
    "BackupAndRestoreCallbackTest::test_backup_corrupted": COUNTS_CALLS,
    "BackupAndRestoreCallbackTest::test_best_case_epoch": COUNTS_CALLS,
    "BackupAndRestoreCallbackTest::test_best_case_step": COUNTS_CALLS,
    "test_model_state_is_current_on_epoch_end": COUNTS_CALLS,
    "test_trainer_with_raggeds": "the output is ragged: a loss of it is refused with a message "
    "that says what to do instead",
    "test_loss_scaling_prevents_underflow": "has an attribute `layers`, which no `keras.Model` may "
    "have; the judge makes a model of it",
    "with_tf_distribute": "trains in the scope of a `tf.distribute` strategy, which is refused: "
    "opensmp itself runs replicas of the model",
}
"""Part of the name of a test to the reason why it does not pass."""


class Outcome(NamedTuple):
    """How a test ended: `"passed"`, `"failed"` or `"skipped"`, and the last line of why."""

    outcome: str
    message: str = ""


# ------------------------------------------------------------------- in the process of the tests


def pytest_configure(config: Any) -> None:
    """Makes models split, where that is asked for; before any test is imported."""
    config.addinivalue_line("markers", "requires_trainable_backend: as in Keras' own settings")
    import keras  # before jax below, for it looks at what jax has
    import pytest

    # The trainer's tests import it whatever the backend is.
    sys.modules.setdefault("jax", types.ModuleType("jax"))
    # Keras' settings of its tests do not come with it.
    settings: Any = types.ModuleType("conftest")
    settings.skip_if_backend = lambda name, reason: pytest.mark.skipif(
        keras.backend.backend() == name, reason=reason
    )
    sys.modules["conftest"] = settings
    if os.environ.get(SPLIT):
        _split_all_models()


def pytest_runtest_logreport(report: Any) -> None:
    """Notes how a test ended, one line each."""
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(crash.message if crash else "").strip().splitlines()
    line = [report.nodeid, report.outcome, message[0] if message else ""]
    with open(os.environ[OUTCOMES], "a") as file:
        file.write(json.dumps(line) + "\n")


def _split_all_models() -> None:
    import keras
    from keras.src.backend.tensorflow import trainer

    import opensmp as smp

    smp.init(CONFIG)
    plain_trainer = trainer.TensorFlowTrainer

    def split(model: Any) -> None:
        if isinstance(model, keras.Model) and not isinstance(model, smp.DistributedModel):
            object.__setattr__(model, "__class__", type(smp.DistributedModel.from_keras(model)))

    def splitting(owner: Any, name: str) -> Any:
        original = vars(owner)[name]

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, smp.DistributedModel) or not isinstance(self, keras.Model):
                return original(self, *args, **kwargs)
            split(self)
            return getattr(self, name)(*args, **kwargs)

        return method

    for name in METHODS:  # where they are, for Keras asks whether a class has one of its own
        owner = next(c for c in plain_trainer.__mro__ if name in vars(c))
        setattr(owner, name, splitting(owner, name))

    class Trainer(keras.Model):  # type: ignore[misc]
        """Stands for the mixin that some tests add to a layer to make a model of it."""

        def __init__(self) -> None:
            plain_trainer.__init__(self)

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            after = cls.__mro__[cls.__mro__.index(keras.Model) + 1 :]
            for name in ("call", "build", "compute_output_shape", "get_config"):
                own = any(name in vars(c) for c in cls.__mro__[: cls.__mro__.index(Trainer)])
                layer = next((c for c in after if name in vars(c)), None)
                if not own and layer is not None:
                    setattr(cls, name, vars(layer)[name])

    trainer.TensorFlowTrainer = Trainer


# -------------------------------------------------------------------------------- the judgement


def test_files(chosen: Sequence[str]) -> list[Path]:
    """Keras' test files, by their paths below `keras/src`."""
    import keras

    source = Path(keras.__file__).parent / "src"
    if chosen:
        return [source / name for name in chosen]
    return sorted(p for part in ("trainers", "callbacks") for p in source.glob(f"{part}/*_test.py"))


def run(path: Path, is_split: bool, seconds: float, only: str = "") -> dict[str, Outcome]:
    """Runs one file of tests; name to outcome."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        environ = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
        environ.update({OUTCOMES: str(outcomes), SPLIT: "1" if is_split else ""})
        environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "src")])
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "keras_judge",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-c", os.devnull, "--rootdir", str(path.parents[3]), "--import-mode=importlib"]
        command += ["-k", only] if only else []
        done = subprocess.run(
            [*command, str(path)],
            env=environ,
            cwd=folder,
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1, 5):
            raise RuntimeError(f"{path} did not run:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
        found: dict[str, Outcome] = {}
        for line in outcomes.read_text().splitlines():
            name, outcome, message = json.loads(line)
            found[name.partition("::")[2]] = Outcome(outcome, message)
        return found


def why(name: str) -> str | None:
    """The reason why a test does not pass, if there is one."""
    return next((reason for part, reason in WHY.items() if part in name), None)


def judge(files: Iterable[Path], seconds: float, only: str = "") -> dict[str, dict[str, Any]]:
    """Each file's tests as they are and with split models."""
    result = {}
    for path in files:
        plain, split = (run(path, is_split, seconds, only) for is_split in (False, True))
        name = f"{path.parent.name}/{path.name}"
        result[name] = {"plain": plain, "split": split}
        print(_row(name, plain, split), flush=True)
        for test, outcome in _failures(plain, split):
            print(f"    {test}: {why(test) or outcome.message}", flush=True)
    return result


def _failures(
    plain: Mapping[str, Outcome], split: Mapping[str, Outcome]
) -> list[tuple[str, Outcome]]:
    """Tests that pass as they are and do not with split models."""
    passed = [name for name, found in plain.items() if found.outcome == "passed"]
    missing = Outcome("failed", "did not run")
    found = [(name, split.get(name, missing)) for name in passed]
    return [(name, outcome) for name, outcome in found if outcome.outcome != "passed"]


def _row(name: str, plain: Mapping[str, Outcome], split: Mapping[str, Outcome]) -> str:
    as_is = Counter(found.outcome for found in plain.values())
    failures = len(_failures(plain, split))
    passed = as_is["passed"]
    return (
        f"| {name} | {passed} | {passed - failures} | {failures} | {as_is['skipped']} | "
        f"{as_is['failed']} |"
    )


HEAD = """\
| file | pass with plain models | of these with split models | not | skipped | fail with both |
| --- | --- | --- | --- | --- | --- |"""


def page(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the documentation."""
    rows = [_row(name, found["plain"], found["split"]) for name, found in result.items()]
    failures = [
        (name, test, why(test) or outcome.message)
        for name, found in result.items()
        for test, outcome in _failures(found["plain"], found["split"])
    ]
    unable = Counter(
        (name, outcome.message)
        for name, found in result.items()
        for outcome in found["plain"].values()
        if outcome.outcome == "failed"
    )
    lines = [
        "# Keras' own tests with split models",
        "",
        "Keras comes with tests of its trainer and callbacks. `python scripts/keras_judge.py "
        "--write` runs them as they are, and again with each model turned into an "
        "`smp.DistributedModel` over 2 partitions and 2 microbatches, and writes this page. "
        f"Keras {metadata.version('keras')}.",
        "",
        HEAD,
        *rows,
        "",
        *_not_run(result),
        "## Those that do not pass with split models",
        "",
        "| test | why |",
        "| --- | --- |",
        *(f"| `{test}` | {reason} |" for _, test, reason in failures),
        "",
        "## Those that fail with plain models too",
        "",
        "| file | tests | what they say |",
        "| --- | --- | --- |",
        *(f"| {name} | {n} | {_escaped(message)} |" for (name, message), n in unable.items()),
        "",
    ]
    return "\n".join(lines)


def _read(kept: Path) -> dict[str, dict[str, dict[str, Outcome]]]:
    return {
        name: {
            way: {test: Outcome(*outcome) for test, outcome in outcomes.items()}
            for way, outcomes in found.items()
        }
        for name, found in json.loads(kept.read_text()).items()
    }


def _not_run(result: Mapping[str, Any]) -> list[str]:
    """Says which of Keras' files have no results here."""
    names = [f"{path.parent.name}/{path.name}" for path in test_files([])]
    missing = [name for name in names if name not in result]
    return [f"Without results in this run: {', '.join(missing)}.", ""] if missing else []


def _escaped(message: str) -> str:
    return message[:160].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="such as callbacks/early_stopping_test.py")
    parser.add_argument("-k", default="", help="only tests whose name has this, as in pytest")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--keep", help="file of results to add to, and to write the page from")
    parser.add_argument("--seconds", type=float, default=900, help="a file may take this long")
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    kept = Path(arguments.keep) if arguments.keep else None
    result = _read(kept) if kept and kept.exists() else {}
    for path in [] if arguments.write and result else test_files(arguments.files):
        for name, found in judge([path], arguments.seconds, arguments.k).items():
            for way, outcomes in found.items():
                result.setdefault(name, {}).setdefault(way, {}).update(outcomes)
            if kept:
                kept.write_text(json.dumps(result))
    if arguments.write:
        PAGE.write_text(page({name: result[name] for name in sorted(result)}))
    failures = [
        test
        for found in result.values()
        for test, _ in _failures(found["plain"], found["split"])
        if why(test) is None
    ]
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
