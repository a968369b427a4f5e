"""What is typed after `opensmp`: options, their values, scripts, factories, shapes."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
import typer
from fuzz.bounds import cases, taken
from fuzz.strategies import NUMBER_TEXTS, either, great, json_texts, json_values, texts
from hypothesis import given
from hypothesis import strategies as st

from opensmp.base.sizes import parse_bytes
from opensmp.cli import app
from opensmp.cli.models.inputs import input_specs, parse_input
from opensmp.cli.models.target import load_target, parse_arguments
from opensmp.cli.running import process_group
from opensmp.cli.running.process_group import RunResult
from opensmp.errors import SmpError

# `opensmp.cli` also has functions of these names.
run_module = importlib.import_module("opensmp.cli.run")
plan_module = importlib.import_module("opensmp.cli.planning")

# Typer brings its own copy of click in some versions.
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Misused(Exception):
    """The words were refused with a usage error, which may repeat all that was typed."""


COMMAND = typer.main.get_command(app)
SWITCHES = (
    "--auto-partition",
    "--no-horovod",
    "--contiguous",
    "--check-finite",
    "-a",
    "--bind-cores",
    "-m",
)
RUN = {
    "-n": ("1", "2", "4"),
    "--processes": ("2",),
    "--partitions": ("2", "4"),
    "--microbatches": ("4",),
    "--pipeline": ("simple", "interleaved"),
    "--active-microbatches": ("4",),
    "--optimize": ("speed",),
    "--placement-strategy": ("spread",),
    "--processes-per-replica": ("1", "2"),
    "--default-partition": ("0",),
    "--devices": ("cpu", "CPU:0,CPU:1"),
    "--plan": ("plan.json", '{"net": "plan.json"}'),
    "--transport": ("auto", "collective"),
    "--pieces-per-partition": ("1", "2"),
    "--show-rank": ("0", "1"),
    "--log-dir": (".",),
    "--max-restarts": ("0", "1"),
    "--join-seconds": ("5", "1e3"),
    "--idle-seconds": ("0", "60"),
}
PLAN = {
    "--partitions": ("2", "4"),
    "--batch": ("32", "360"),
    "--microbatches": ("1", "4", "7"),
    "--pipeline": ("simple", "zero_bubble"),
    "--active-microbatches": ("4",),
    "--optimize": ("speed",),
    "--pieces-per-partition": ("1", "2"),
    "--device-memory": ("16GiB", "1.5 kB", "80G"),
    "--device-flops": ("1e13", "0"),
    "--device-bandwidth": ("900GB",),
    "--link-bandwidth": ("25GB", "4096"),
    "--input": ("224x224x3", "token_ids=128/int32", "/float32"),
    "--arg": ("weights=null", "shape=[64, 3]", "name=small"),
    "--output": ("plan.json",),
    "--picture": ("plan.svg",),
}
SCRIPTS = ("fuzzed_script.py", "absent.py", ".", "-c")


class Reached(Exception):
    """The arguments were taken: what follows is no parser."""


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_started(tmp_path_factory):
    """A run begins no ranks, a plan no model."""
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "fuzzed_script.py").write_text("build = 3\nclass Zoo:\n    build = 4\n")

    class Ranks:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            inspect.signature(process_group.Ranks).bind(*arguments, **named)

        def run(self) -> RunResult:
            return RunResult(0, None, None, 0.0)

    class ExitNotifier:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            inspect.signature(run_module.ExitNotifier).bind(*arguments, **named)

        def tell(self, rank: int) -> None: ...
        def close(self) -> None: ...

    def reached(*_: Any) -> None:
        raise Reached

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(run_module, "Ranks", Ranks)
        patch.setattr(run_module, "ExitNotifier", ExitNotifier)
        patch.setattr(run_module.rendezvous, "reserve_port", lambda *_: (stack, 4711))
        patch.setattr(plan_module, "_model", reached)
        yield


@st.composite
def options(draw: st.DrawFn, right: dict[str, tuple[str, ...]], *required: str) -> list[str]:
    words: list[str] = []
    names = set(draw(st.sets(st.sampled_from(sorted(right)), max_size=4))) | set(required)
    for name in sorted(names):
        odd = st.sampled_from(NUMBER_TEXTS) | texts(*right[name])
        words += [name, draw(either(st.sampled_from(right[name]), odd))]
    words += draw(st.lists(st.sampled_from(SWITCHES), max_size=1))
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(texts("--batch=2")))
    return words


def typed(*words: str) -> None:
    """A command with these words, which come from the system and so have no NUL in them."""
    given_words = [word.replace("\x00", "") for word in words]

    def call() -> None:
        try:
            COMMAND.main(given_words, prog_name="opensmp", standalone_mode=False)
        except (Reached, typer.Exit):
            pass
        except UsageError as error:
            raise Misused(f"{type(error).__name__}: {error.format_message()[:1000]}") from None

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        taken(call, refusals=(SmpError, Misused))


@cases()
@given(
    words=options(RUN),
    script=either(st.sampled_from(SCRIPTS), texts(*SCRIPTS)),
    more=st.lists(texts("--flag"), max_size=1),
)
def test_words_of_a_run_are_taken_or_refused(words, script, more):
    typed("run", *words, script, *more)


@cases()
@given(words=options(PLAN, "--partitions", "--batch"), target=texts("keras.applications:ResNet50"))
def test_words_of_a_plan_are_taken_or_refused(words, target):
    typed("plan", *words, "--", target)


@cases(one_in=3)
@given(words=st.lists(texts("run", "plan", "--help", "-n"), max_size=3))
def test_commands_are_taken_or_refused(words):
    typed(*words)


@cases()
@given(
    module=either(
        st.sampled_from(("fuzzed_script", "fuzzed_script.py", "./fuzzed_script.py")),
        texts("fuzzed_script", "fuzzed_script.py", "", ".", "os.path"),
    ),
    name=either(st.sampled_from(("build", "Zoo", "Zoo.build", "build.real")), texts("Zoo.build")),
)
def test_targets_are_taken_or_refused(module, name):
    # Only what is in the folder of the test is imported: a module may do anything.
    stem = Path(module.replace("\x00", "").replace("/", "_")[:99]).name
    there = "fuzzed_script" in module or not stem.split(".")[0].isidentifier()
    taken(lambda: load_target(f"{module}:{name}" if there else f"fuzzed_script:{name}"))


@cases()
@given(
    values=st.lists(
        st.tuples(
            either(st.sampled_from(("weights", "name", "shape")), texts("weights")),
            json_texts(json_values()) | texts("null"),
        ),
        max_size=3,
    )
)
def test_arguments_of_a_factory_are_taken_or_refused(values):
    taken(lambda: parse_arguments([f"{name}={value}" for name, value in values]))


INPUTS = ("224x224x3", "128/int32", "token_ids=128/int32", "/float32", "8,3", "a.b-c=1")
DTYPES = ("float32_ref", "resource", "variant", "qint8", "bfloat16", "float8_e5m2", "half", "str")


@cases()
@given(
    given_texts=st.lists(
        texts(*INPUTS)
        | st.builds("{}={}/{}".format, texts("x"), texts("8x3"), st.sampled_from(DTYPES))
        | great(("1x", "9x9x", "a=", "1/")),
        min_size=1,
        max_size=3,
    ),
    microbatch=st.sampled_from((1, 4, 10**9)),
)
def test_inputs_are_taken_or_refused(given_texts, microbatch):
    def call() -> Any:
        return input_specs(None, [parse_input(text) for text in given_texts], microbatch)

    result = taken(call)
    if result.error is None:
        with tf.Graph().as_default():
            for spec in tf.nest.flatten(result.value):
                placeholder = tf.compat.v1.placeholder(spec.dtype, spec.shape)
                assert placeholder.shape.num_elements() >= 1


@cases()
@given(text=texts("16GiB", "1.5 kB", "4096", ".5MB", "80G", "1.GiB") | st.just("9e9B"))
def test_amounts_of_memory_are_taken_or_refused(text):
    result = taken(lambda: parse_bytes(text, "--device-memory"))
    assert result.error is not None or 1 <= result.value <= 2**60
