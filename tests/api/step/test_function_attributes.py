from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.errors import NotInitializedError, StepError

ROWS = tf.constant([[1.0], [2.0], [3.0], [4.0]])
OF_A_FUNCTION = [name for name in dir(tf.function(lambda x: x)) if not name.startswith("_")]


@pytest.fixture
def model(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    inputs = keras.Input([1])
    layers = [keras.layers.Rescaling(3.0), keras.layers.Rescaling(2.0)]
    return smp.DistributedModel(inputs, layers[1](layers[0](inputs)))


def test_a_step_has_every_public_name_of_a_tf_function(model):
    step = smp.step(lambda x: model(x))
    missing = [name for name in OF_A_FUNCTION if not hasattr(step, name)]
    assert missing == []


def test_signatures_of_all_traces_are_printed(model):
    @smp.step
    def forward(rows):
        return model(rows)

    assert forward.pretty_printed_concrete_signatures() == ""
    forward(ROWS)
    forward(tf.tile(ROWS, [3, 1]))
    tf.function(lambda: forward(ROWS))()
    printed = forward.pretty_printed_concrete_signatures()
    assert printed.count("rows (POSITIONAL_OR_KEYWORD)") == 3
    assert printed.count("shape=(12, 1)") == 1
    assert forward.experimental_get_tracing_count() == 3
    short = forward.pretty_printed_concrete_signatures(verbose=False)
    assert short.count("(rows:") == 3
    smp.shutdown()
    smp.init({"partitions": 2})
    forward(ROWS)
    assert forward.pretty_printed_concrete_signatures().count("rows (") == 1


def test_parameters_and_their_defaults_are_those_of_the_function(model):
    @smp.step(non_split_inputs=["factor"])
    def forward(rows, factor=2.0):
        return model(rows) * factor

    spec = forward.function_spec
    assert spec.arg_names == ["rows", "factor"]
    assert list(forward.function_type.parameters) == ["rows", "factor"]
    assert forward.input_signature is None
    assert forward.name == "forward"


def test_the_input_signature_is_that_of_the_whole_batch(model):
    @smp.step(input_signature=[tf.TensorSpec([None, 1])])
    def forward(rows):
        return model(rows)

    assert forward.input_signature == (tf.TensorSpec([None, 1]),)
    forward(ROWS)
    forward(tf.tile(ROWS, [2, 1]))
    assert forward.experimental_get_tracing_count() == 1


def test_the_attributes_of_a_method_are_those_of_its_object(model):
    class Trainer:
        @smp.step
        def forward(self, rows):
            return model(rows)

    one, other = Trainer(), Trainer()
    one.forward(ROWS)
    assert one.forward.pretty_printed_concrete_signatures().count("rows (") == 1
    assert other.forward.pretty_printed_concrete_signatures() == ""
    assert "self" not in one.forward.function_type.parameters


def test_a_concrete_function_takes_the_whole_batch(model):
    concrete = smp.step(lambda x: model(x)).get_concrete_function(tf.TensorSpec([None, 1]))
    np.testing.assert_array_equal(concrete(ROWS).merge(), 6.0 * ROWS)
    assert concrete.structured_input_signature[0][0].shape == (None, 1)


def test_the_compiled_program_is_shown_with_one_partition(smp_init):
    smp_init({"partitions": 1, "microbatches": 2})
    inputs = keras.Input([1])
    model = smp.DistributedModel(inputs, keras.layers.Rescaling(3.0)(inputs))

    @smp.step(jit_compile=True)
    def forward(rows):
        return model(rows)

    forward(ROWS)
    assert "HloModule" in forward.experimental_get_compiler_ir(ROWS)(stage="hlo")


def test_with_several_partitions_there_is_no_compiled_program(model):
    step = smp.step(lambda x: model(x), jit_compile=True)
    with pytest.raises(StepError, match="jit_compile=True is not possible with 2 partitions"):
        step.experimental_get_compiler_ir(ROWS)


def test_before_init_a_step_says_what_to_call():
    step = smp.step(lambda x: x)
    assert step.pretty_printed_concrete_signatures() == ""
    assert step.input_signature is None
    with pytest.raises(NotInitializedError, match=r"smp\.init"):
        _ = step.function_spec
