"""Training with recomputation: the same bits, in whatever way the steps run."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import recomputing
import tensorflow as tf
from processes import check_ranks
from recomputing import MODELS, assert_equal, by_fit, by_own_step, trained, twice
from small import Net, batch
from turns import in_turn

import opensmp as smp
from opensmp.errors import ConfigError

MIXED = {
    "default": "selective",
    "partitions": {0: "full"},
    "layers": {"dense*": "full", "*attention*": "none"},
}
LEVELS = {"selective": "selective", "full": "full", "mixed": MIXED}


EXACT = ("normalized", "looping")
"""Models for which TensorFlow's optimizer of arithmetic treats parts of a pass as the whole.

Around numbers that are kept, it may move a constant factor elsewhere, which rounds differently.
"""


def check(name: str, way: Any = recomputing.by_step, bits: bool | None = None, **config: Any):
    none = trained(name, "none", way, **config)
    bits = name in EXACT if bits is None else bits
    for level, setting in LEVELS.items():
        if level == "mixed" and name != "attending":
            setting = {"partitions": {0: "full"}}
        assert_equal(trained(name, setting, way, **config), none, f"{name} {level} {config}", bits)


@pytest.mark.parametrize("name", in_turn(MODELS, 2))
def test_losses_and_variables_are_equal(name):
    check(name)


@pytest.mark.parametrize("name", in_turn(["drawing", "attending"], 2))
def test_without_rewriting_of_arithmetic_they_have_equal_bits(name):
    options = {"arithmetic_optimization": False, "constant_folding": False}
    tf.config.optimizer.set_experimental_options(options)
    try:
        check(name, bits=True)
    finally:
        tf.config.optimizer.set_experimental_options(dict.fromkeys(options, True))


@pytest.mark.parametrize(
    "config",
    in_turn(
        [
            {"pipeline": "zero_bubble"},
            {"pipeline": "simple"},
            {"pieces_per_partition": 2},
            {"check_finite": True},
            {"partitions": 1, "microbatches": 1},
            {"optimize": "speed"},
        ],
        3,
    ),
)
def test_they_do_with_every_schedule(config):
    check("drawing", **config)


WAYS = {"fit": by_fit, "own step": by_own_step, "twice": twice}


@pytest.mark.parametrize("way", in_turn(WAYS, 3))
def test_they_do_in_every_kind_of_step(way):
    check("normalized", WAYS[way])


def test_they_do_with_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        check("attending")
    finally:
        keras.config.set_dtype_policy("float32")


SCRIPT = """
import os

from recomputing import assert_equal, by_fit, by_own_step, by_step, trained
for name, way, config in [
    ("normalized", by_step, {}),
    ("drawing", by_fit, {"pipeline": "zero_bubble"}),
    ("normalized", by_own_step, {"check_finite": True}),
]:
    # One plan for all: cut elsewhere, ranks have other variables, and TensorFlow fuses otherwise.
    plan = os.path.join(os.path.dirname(__file__), f"{name}-{way.__name__}.json")
    none = trained(name, "none", way, plan_to=plan, **config)
    for level in ("selective", "full", {"partitions": {1: "full"}}):
        found = trained(name, level, way, plan=plan, **config)
        assert_equal(found, none, f"{name} {level}", name == "normalized")
print("EQUAL", flush=True)
"""


def test_two_ranks_get_equal_bits():
    for result in check_ranks(SCRIPT, 2, seconds=500):
        assert "EQUAL" in result.output


def test_an_unknown_layer_is_refused_with_the_nearest_name(smp_init):
    smp_init({"partitions": 2, "recompute": {"layers": {"hiden": "full"}}})
    model = Net()

    @smp.step
    def forward(x):
        return model(x)

    with pytest.raises(ConfigError, match=r"'hiden' \(did you mean 'hidden'\?\)"):
        forward(batch(4))


def test_a_layer_of_another_model_is_known(smp_init):
    smp_init({"partitions": 2, "recompute": {"layers": {"hidden": "full", "other": "full"}}})
    model = Net()
    other = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, name="other")])
    )

    @smp.step
    def forward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    forward(batch(4))
    assert other.layers


def test_a_plan_that_recomputes_is_not_used_without_it_silently(smp_init, tmp_path, caplog):
    path = str(tmp_path / "plan.json")
    for recompute, made in (("full", None), ("none", path), ("selective", path)):
        caplog.clear()
        smp_init({"partitions": 2, "plan": made, "recompute": recompute})
        model = Net()
        model(batch(4))
        if made is None:
            model.plan.save(path)
        told = [r.getMessage() for r in caplog.records if "this run has none" in r.getMessage()]
        assert len(told) == (recompute == "none")
        assert not told or 'Add "recompute": "full" to smp.init' in told[0]
