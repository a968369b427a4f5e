"""What holds for all private names, and for a few that are no functions."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from opensmp import _private

HERE = Path(__file__).parent
# What one file of the package has for another.
AMONG_THEMSELVES = {
    "average_what_is_here",
    "give_memory",
    "is_slot",
    "keep_now",
    "know_slot",
    "make_unreadable",
    "mark_slot",
    "outside_of_functions",
    "overwrite_what_is_here",
    "readable_kind",
    "redirected",
    "shards_now",
    "share_averages",
    "share_updates",
    "shed_slot",
    "slot_device",
    "slots_here",
    "updating",
}


def test_every_function_has_a_canary():
    """In the file of the same name: `test_<function>`, or `test_<function>__<claim>`."""
    missing = []
    for name, function in vars(_private).items():
        if inspect.isfunction(function):
            *folders, module = function.__module__.removeprefix(f"{_private.__name__}.").split(".")
            canaries = HERE.joinpath(*folders, f"test_{module}.py").read_text(encoding="utf-8")
            if not re.search(rf"^def test_{name}(__\w+)?\(", canaries, re.MULTILINE):
                missing.append(f"{module}.{name}")
    assert missing == []


def test_every_function_is_handed_out():
    folder = Path(_private.__file__).parent
    modules = {
        ".".join([_private.__name__, *path.relative_to(folder).with_suffix("").parts])
        for path in folder.rglob("[a-z]*.py")
    }
    defined = {
        name
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if inspect.isfunction(value) and value.__module__ == module
    }
    public = {name for name in defined if not name.startswith("_")}
    assert public - vars(_private).keys() == AMONG_THEMSELVES


def test_functional_is_the_class_of_functional_models():
    inputs = keras.Input([1])
    assert type(keras.Model(inputs, inputs + 1.0)) is _private.Functional


def test_autograph_lets_our_errors_pass():
    """It replaces exceptions unless they have the attribute `ag_pass_through`."""
    from opensmp.errors import StepError

    @tf.function
    def run(x):
        raise StepError("as it is")

    with pytest.raises(StepError) as caught:
        run(tf.constant(1.0))
    assert str(caught.value) == "as it is"


def test_nothing_else_in_the_package_touches_private_names():
    here = Path(_private.__file__).parent
    offenders = [
        f"{path.relative_to(here.parent)}: {line.strip()}"
        for path in here.parent.rglob("*.py")
        if here not in path.parents
        for line in path.read_text(encoding="utf-8").splitlines()
        if "tensorflow.python" in line or "keras.src" in line
    ]
    assert offenders == []


def test_bookkeeping_names_all_that_keras_keeps_in_layers_for_itself():
    inputs = keras.Input((1,))
    made = [
        keras.layers.Layer(),
        keras.Sequential([inputs, keras.layers.Identity()]),
        keras.Model(inputs, keras.layers.Identity()(inputs)),
    ]
    for model in made[1:]:
        model.compile("sgd", "mse", metrics=["mae"])
        model.fit(tf.ones((2, 1)), tf.ones((2, 1)), verbose=0)
        model.predict(tf.ones((2, 1)), verbose=0)
    private = {name for each in made for name in vars(each) if name.startswith("_")}
    read_by_calls = {"_dtype", "_dtype_policy", "_supports_masking", "_trainable"}
    assert private - read_by_calls <= _private.BOOKKEEPING
    assert {"history", "stop_training", "train_function"} <= _private.BOOKKEEPING
    assert not read_by_calls & _private.BOOKKEEPING
