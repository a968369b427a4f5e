from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.api.step.step_output import StepOutput
from opensmp.errors import StepError

ROWS = StepOutput([tf.constant([[1.0, 2.0]]), tf.constant([[3.0, 6.0]])])
SCALARS = StepOutput([tf.constant(1.0), tf.constant(4.0)])
INTEGERS = StepOutput([tf.constant([1, 2]), tf.constant([2, 3])])


def slices() -> StepOutput:
    """Sparse gradients of a table of 4 rows; row 1 has one in both microbatches."""
    return StepOutput(
        [
            tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([0, 1]), tf.constant([4, 1])),
            tf.IndexedSlices(tf.constant([[4.0]]), tf.constant([1]), tf.constant([4, 1])),
        ]
    )


def sparse() -> StepOutput:
    return StepOutput([tf.sparse.from_dense([[1.0, 0.0]]), tf.sparse.from_dense([[2.0, 4.0]])])


def ragged() -> StepOutput:
    return StepOutput([tf.ragged.constant([[1.0]]), tf.ragged.constant([[2.0, 3.0], []])])


def values(tensor: Any) -> Any:
    return tensor.numpy().tolist()


class TestSequence:
    def test_outputs_are_the_tensors_in_order(self):
        assert [values(t) for t in ROWS.outputs] == [[[1.0, 2.0]], [[3.0, 6.0]]]

    def test_outputs_is_a_list_of_its_own(self):
        ROWS.outputs.clear()
        assert len(ROWS.outputs) == 2

    def test_it_is_a_sequence_by_microbatch(self):
        assert len(SCALARS) == 2
        assert [float(t) for t in SCALARS] == [1.0, 4.0]
        assert float(SCALARS[1]) == 4.0
        assert float(SCALARS[-1]) == 4.0
        assert [float(t) for t in SCALARS[:1]] == [1.0]

    def test_repr_tells_number_shape_and_dtype(self):
        assert repr(ROWS) == "StepOutput(2 microbatches of shape=(1, 2), dtype=float32)"
        assert repr(slices()) == "StepOutput(2 microbatches of shape=(4, 1), dtype=float32)"


class TestReductions:
    def test_mean(self):
        assert values(ROWS.reduce_mean()) == [[2.0, 4.0]]
        assert values(SCALARS.reduce_mean()) == 2.5

    def test_mean_of_integers_is_a_floating_point_number(self):
        assert values(INTEGERS.reduce_mean()) == [1.5, 2.5]

    def test_sum_keeps_the_dtype(self):
        assert values(ROWS.reduce_sum()) == [[4.0, 8.0]]
        assert INTEGERS.reduce_sum().dtype == tf.int32
        assert values(INTEGERS.reduce_sum()) == [3, 5]

    def test_sparse_gradients_stay_sparse_and_add_up_where_rows_meet(self):
        total, mean = slices().reduce_sum(), slices().reduce_mean()
        assert isinstance(total, tf.IndexedSlices)
        assert isinstance(mean, tf.IndexedSlices)
        assert values(tf.convert_to_tensor(total)) == [[1.0], [6.0], [0.0], [0.0]]
        assert values(tf.convert_to_tensor(mean)) == [[0.5], [3.0], [0.0], [0.0]]

    def test_sparse_tensors_stay_sparse(self):
        total, mean = sparse().reduce_sum(), sparse().reduce_mean()
        assert isinstance(total, tf.SparseTensor)
        assert values(tf.sparse.to_dense(total)) == [[3.0, 4.0]]
        assert values(tf.sparse.to_dense(mean)) == [[1.5, 2.0]]

    @pytest.mark.parametrize("tensor", [tf.constant(["a"]), tf.constant([True])])
    @pytest.mark.parametrize("method", ["reduce_mean", "reduce_sum", "accumulate"])
    def test_no_arithmetic_on_strings_and_booleans(self, tensor, method):
        what = "sum" if method == "reduce_sum" else "mean"
        with pytest.raises(StepError, match=f"a {what} of {tensor.dtype.name} values is not defin"):
            getattr(StepOutput([tensor, tensor]), method)()

    @pytest.mark.parametrize("method", ["reduce_mean", "reduce_sum", "accumulate", "stack"])
    def test_microbatches_of_different_shape_are_refused_with_the_shapes(self, method):
        output = StepOutput([tf.ones([2, 3]), tf.ones([1, 3])])
        with pytest.raises(StepError) as caught:
            getattr(output, method)()
        assert "(2, 3) and (1, 3)" in str(caught.value)
        assert "merge" in str(caught.value)

    def test_one_microbatch(self):
        output = StepOutput([tf.constant([2.0, 4.0])])
        for method in ("reduce_mean", "reduce_sum", "accumulate", "concat", "merge"):
            assert values(getattr(output, method)()) == [2.0, 4.0]
        assert values(output.stack()) == [[2.0, 4.0]]


class TestConcatenation:
    @pytest.mark.parametrize("method", ["concat", "merge"])
    def test_along_the_batch(self, method):
        assert values(getattr(ROWS, method)()) == [[1.0, 2.0], [3.0, 6.0]]

    def test_along_another_axis(self):
        assert values(ROWS.concat(axis=1)) == [[1.0, 2.0, 3.0, 6.0]]
        assert values(ROWS.concat(-1)) == [[1.0, 2.0, 3.0, 6.0]]

    @pytest.mark.parametrize("method", ["concat", "merge", "stack"])
    def test_scalars_become_a_vector(self, method):
        assert values(getattr(SCALARS, method)()) == [1.0, 4.0]

    def test_microbatches_of_different_length_are_merged(self):
        output = StepOutput([tf.constant([1, 2]), tf.constant([3])])
        assert values(output.merge()) == [1, 2, 3]

    def test_strings(self):
        output = StepOutput([tf.constant(["a"]), tf.constant(["b"])])
        assert values(output.merge()) == [b"a", b"b"]

    def test_stack_makes_a_first_axis_of_microbatches(self):
        assert values(ROWS.stack()) == [[[1.0, 2.0]], [[3.0, 6.0]]]

    def test_ragged_tensors(self):
        assert ragged().merge().to_list() == [[1.0], [2.0, 3.0], []]
        assert ragged().stack().to_list() == [[[1.0]], [[2.0, 3.0], []]]

    def test_sparse_tensors_are_merged_as_sparse_tensors(self):
        merged = sparse().merge()
        assert isinstance(merged, tf.SparseTensor)
        assert values(tf.sparse.to_dense(merged)) == [[1.0, 0.0], [2.0, 4.0]]
        wide = sparse().concat(axis=1)
        assert values(tf.sparse.to_dense(wide)) == [[1.0, 0.0, 2.0, 4.0]]

    def test_sparse_tensors_are_stacked_as_dense_ones(self):
        assert values(sparse().stack()) == [[[1.0, 0.0]], [[2.0, 4.0]]]

    def test_sparse_gradients_are_stacked_as_dense_ones(self):
        assert slices().stack().shape == (2, 4, 1)
        assert values(slices().stack()[1]) == [[0.0], [4.0], [0.0], [0.0]]


METHODS = pytest.mark.parametrize("method", ["variable", "add_n", "accumulate_n"])


class TestAccumulate:
    @METHODS
    def test_every_method_gives_the_mean(self, method):
        assert values(ROWS.accumulate(method)) == [[2.0, 4.0]]
        assert values(INTEGERS.accumulate(method)) == [1.5, 2.5]
        mean = slices().accumulate(method)
        assert isinstance(mean, tf.IndexedSlices)
        assert values(tf.convert_to_tensor(mean)) == [[0.5], [3.0], [0.0], [0.0]]

    def test_default_is_the_same_as_reduce_mean_to_the_bit(self):
        rng = np.random.default_rng(0)
        output = StepOutput([tf.constant(rng.normal(size=[50])) for _ in range(7)])
        assert values(output.accumulate()) == values(output.reduce_mean())

    @METHODS
    def test_a_variable_holds_the_mean_afterwards(self, method):
        var = tf.Variable([[9.0, 9.0]])
        assert values(ROWS.accumulate(method, var)) == [[2.0, 4.0]]
        assert values(var) == [[2.0, 4.0]]
        ROWS.accumulate(method, var=var)
        assert values(var) == [[2.0, 4.0]]

    @METHODS
    def test_a_variable_for_sparse_gradients_holds_the_dense_mean(self, method):
        var = tf.Variable(tf.zeros([4, 1]))
        mean = slices().accumulate(method, var=var)
        assert values(mean) == values(var) == [[0.5], [3.0], [0.0], [0.0]]

    @METHODS
    def test_a_variable_of_keras_holds_the_mean(self, method):
        var = keras.Variable([[9.0, 9.0]])
        assert values(ROWS.accumulate(method, var)) == values(var.value) == [[2.0, 4.0]]

    @METHODS
    def test_the_mean_of_more_than_nine_microbatches_is_that_without_a_variable(self, method):
        rng = np.random.default_rng(0)
        output = StepOutput([tf.constant(rng.normal(size=[50])) for _ in range(12)])
        var = tf.Variable(tf.zeros([50], tf.float64))
        np.testing.assert_allclose(output.accumulate(method, var), output.accumulate(method))

    @METHODS
    def test_a_variable_in_a_graph_is_assigned_in_order(self, method):
        var = tf.Variable([[0.0, 0.0]])

        @tf.function
        def run(first, second):
            return StepOutput([first, second]).accumulate(method, var=var)

        assert values(run(*ROWS)) == [[2.0, 4.0]]
        assert values(var) == [[2.0, 4.0]]

    @pytest.mark.parametrize(
        ("method", "var", "parts"),
        [
            ("mean", None, ["method='mean' is unknown", "'variable', 'add_n', 'accumulate_n'"]),
            ("add_n", [0.0], ["must have shape (1, 2) and dtype float32", "received shape (1,)"]),
            (
                "variable",
                [0.0],
                ["must have shape (1, 2) and dtype float32", "received shape (1,)"],
            ),
            ("variable", [[0, 0]], ["dtype float32 like the outputs", "dtype int32"]),
        ],
    )
    def test_what_does_not_fit_is_refused(self, method, var, parts):
        with pytest.raises(StepError) as caught:
            ROWS.accumulate(method, None if var is None else tf.Variable(var))
        for part in parts:
            assert part in str(caught.value)

    def test_an_integer_variable_cannot_hold_a_mean(self):
        with pytest.raises(StepError, match="mean needs a floating-point var, received int32"):
            INTEGERS.accumulate(var=tf.Variable([0, 0]))


class TestComposite:
    def test_nest_takes_it_apart_and_puts_it_together(self):
        flat = tf.nest.flatten({"x": ROWS, "y": SCALARS}, expand_composites=True)
        assert [t.shape.rank for t in flat] == [2, 2, 0, 0]
        doubled = tf.nest.map_structure(lambda t: 2 * t, ROWS, expand_composites=True)
        assert isinstance(doubled, StepOutput)
        assert values(doubled.reduce_mean()) == [[4.0, 8.0]]

    def test_it_goes_into_and_out_of_a_function(self):
        @tf.function
        def run(output):
            assert isinstance(output, StepOutput)
            return {"sum": output.reduce_sum(), "all": StepOutput([t + 1.0 for t in output])}

        result = run(ROWS)
        assert values(result["sum"]) == [[4.0, 8.0]]
        assert isinstance(result["all"], StepOutput)
        assert values(result["all"].merge()) == [[2.0, 3.0], [4.0, 7.0]]

    def test_sparse_gradients_come_out_of_a_function_as_such(self):
        @tf.function
        def run():
            return slices()

        assert isinstance(run(), StepOutput)
        assert isinstance(run()[0], tf.IndexedSlices)

    def test_the_device_of_reduction_survives_a_function(self):
        @tf.function
        def run(output):
            return output

        output = run(StepOutput([tf.constant(1.0), tf.constant(2.0)], "/device:CPU:2"))
        assert output.reduce_sum().device.endswith("CPU:2")
        assert output.merge().device.endswith("CPU:2")
        assert output.stack().device.endswith("CPU:2")
        assert output.accumulate().device.endswith("CPU:2")

    def test_without_a_device_the_reduction_is_where_the_caller_is(self):
        with tf.device("CPU:3"):
            assert SCALARS.reduce_sum().device.endswith("CPU:3")


class TestAsArgument:
    """A step's output is a batch in microbatches already: the teacher's to the student."""

    def test_it_splits_into_its_microbatches(self):
        assert ROWS.smp_slice(2, 1, 0) is ROWS[1]

    def test_another_number_of_microbatches_is_refused(self):
        with pytest.raises(StepError, match=r"2 microbatches.*step has 4.*merge\(\)"):
            ROWS.smp_slice(4, 0, 0)

    def test_a_step_takes_the_output_of_another(self, smp_init):
        smp_init({"microbatches": 2})
        model = smp.DistributedModel.from_keras(scaled(3.0))

        @smp.step
        def first(x):
            return model(x)

        @smp.step
        def second(y, x):
            return model(x) - y

        x = tf.constant([[1.0], [2.0], [3.0], [4.0]])
        assert values(second(first(x), x).merge()) == [[0.0]] * 4


def scaled(factor: float) -> Any:
    import keras

    inputs = keras.Input([1])
    return keras.Model(inputs, keras.layers.Rescaling(factor)(inputs))


ACCUMULATED = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2})
keras.utils.set_random_seed(0)
inputs = keras.Input((4,))
model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(4)(inputs)))
model = smp.DistributedModel.from_keras(model)
optimizer = keras.optimizers.SGD(0.1)
sums = [tf.Variable(tf.zeros(v.shape)) for v in model.trainable_variables]

@smp.step
def forward_backward(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss

@tf.function
def train(x, method):
    gradients, loss = forward_backward(x)
    if method:
        gradients = [g.accumulate(method, var=v) for g, v in zip(gradients, sums)]
    else:
        gradients = [g.accumulate() for g in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss.reduce_mean()

x = tf.constant(np.arange(16, dtype="float32").reshape(4, 4) / 16)
model(x)
start = model.get_weights()
losses = [float(train(x, None)) for _ in range(12)]
for method in ("variable", "add_n"):
    model.set_weights(start)
    for v in sums:
        v.assign(tf.zeros_like(v))
    same = [float(train(x, method)) for _ in range(12)] == losses
    print(same, [bool(tf.reduce_any(v != 0.0)) for v in sums], flush=True)
"""


def test_gradients_of_other_ranks_are_left_out_of_variables():
    first, second = check_ranks(ACCUMULATED, 2)
    assert first.lines[-2:] == ["True [True, True, False, False]"] * 2, first.output
    assert second.lines[-2:] == ["True [False, False, True, True]"] * 2, second.output


class TestNotebook:
    def test_the_values_of_each_microbatch_are_shown(self):
        shown = ROWS._repr_html_()
        assert "StepOutput(2 microbatches of shape=(1, 2)" in shown
        assert "[[1. 2.]]" in shown
        assert "[[3. 6.]]" in shown

    def test_many_large_outputs_are_shown_in_short(self):
        output = StepOutput([tf.zeros([100, 50, 20])] * 12)
        shown = output._repr_html_()
        assert shown.count("(100, 50, 20)") == 13
        assert len(shown) < 8_000

    @pytest.mark.parametrize("output", [slices(), sparse(), ragged(), SCALARS, INTEGERS])
    def test_every_kind_of_output_is_shown(self, output):
        assert output._repr_html_().count("<tr>") == 3

    def test_symbolic_outputs_have_a_shape_and_no_values(self):
        shown = []

        @tf.function
        def run(x):
            shown.append(StepOutput([x, x])._repr_html_())
            return x

        run(tf.zeros([3]))
        assert shown[0].count("(3,)") == 3

    def test_text_in_an_output_stays_text(self):
        assert "<b>" not in StepOutput([tf.constant("<b>")])._repr_html_()
