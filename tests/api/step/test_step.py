from __future__ import annotations

import collections
import functools
import gc
import inspect
import weakref
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, TWO_BY_FOUR, TWO_BY_TWO, Net, Scale, batch, device_index, plain_net

import opensmp as smp
from opensmp.errors import StepError

COLUMN = tf.constant([[1.0], [2.0], [3.0], [4.0]])


def values(tensor: Any) -> Any:
    return tensor.numpy().tolist()


@pytest.fixture
def scale(smp_init) -> Scale:
    """A model that triples, in a world of two partitions and two microbatches."""
    smp_init(TWO_BY_TWO)
    return Scale(3.0)


class TestDecorating:
    def test_bare_and_called_are_the_same(self, scale):
        @smp.step
        def bare(x):
            return scale(x)

        @smp.step()
        def called(x):
            return scale(x)

        assert (
            values(bare(COLUMN).merge()) == values(called(COLUMN).merge()) == [[3], [6], [9], [12]]
        )

    def test_the_decorated_function_keeps_name_and_documentation(self):
        @smp.step
        def forward(x):
            """Runs forward."""
            return x

        assert forward.__name__ == "forward"
        assert forward.__doc__ == "Runs forward."
        assert repr(forward) == "smp.step('forward')"
        assert forward.python_function(1) == 1

    def test_nothing_runs_before_the_first_call(self):
        @smp.step
        def forward(x):
            raise AssertionError

        assert forward.experimental_get_tracing_count() == 0
        assert smp.is_initialized() is False

    def test_a_method_is_bound_to_its_object(self, scale):
        class Trainer:
            def __init__(self, offset):
                self.offset = offset

            @smp.step
            def forward(self, x, *, plus=0.0):
                return scale(x) + self.offset + plus

            @smp.step(non_split_inputs=["whole"])
            def shifted(self, x, whole):
                return scale(x) + whole

        one, two = Trainer(1.0), Trainer(2.0)
        assert values(one.forward(COLUMN).merge()) == [[4], [7], [10], [13]]
        assert values(two.forward(COLUMN, plus=1.0).merge()) == [[6], [9], [12], [15]]
        assert values(one.forward(COLUMN).merge()) == [[4], [7], [10], [13]]
        assert values(one.shifted(COLUMN, tf.constant([1.0])).merge()) == [[4], [7], [10], [13]]

    def test_static_and_class_methods(self, scale):
        class Trainer:
            offset = 1.0

            @staticmethod
            @smp.step
            def static(x):
                return scale(x)

            @classmethod
            @smp.step
            def of_class(cls, x):
                return scale(x) + cls.offset

        assert values(Trainer.static(COLUMN).merge()) == [[3], [6], [9], [12]]
        assert values(Trainer.of_class(COLUMN).merge()) == [[4], [7], [10], [13]]

    @pytest.mark.parametrize("kind", ["lambda", "partial", "callable object"])
    def test_other_callables(self, scale, kind):
        class Adds:
            def __call__(self, x):
                if tf.reduce_sum(x) > 0.0:
                    x = x + 1.0
                return scale(x)

        def plus(y, x):
            return scale(x + y)

        functions = {
            "lambda": lambda x: scale(x + 1.0),
            "partial": functools.partial(plus, 1.0),
            "callable object": Adds(),
        }
        forward = smp.step(functions[kind])
        assert values(forward(COLUMN).merge()) == [[6], [9], [12], [15]]

    def test_the_schedule_can_be_printed_after_the_first_call(self, scale):
        @smp.step
        def forward(x):
            return scale(x)

        with pytest.raises(StepError, match="no schedule yet: call it once"):
            _ = forward.schedule
        forward(COLUMN)
        assert [[str(a) for a in order] for order in forward.schedule.orders] == [
            [],
            ["0F0", "0F1"],
        ]
        assert "device 1" in str(forward.schedule)


class TestTfFunctionArguments:
    def test_input_signature_with_an_unknown_batch(self, scale):
        @smp.step(input_signature=[tf.TensorSpec([None, 1])])
        def forward(x):
            assert x.shape.as_list() == [None, 1]
            return scale(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]
        assert values(forward(COLUMN[:2]).merge()) == [[3], [6]]
        assert forward.experimental_get_tracing_count() == 1
        with pytest.raises(StepError) as caught:
            forward(COLUMN[:3])
        assert "cannot be split into 2 microbatches" in str(caught.value)
        assert "argument 'x' has 3 entries, which is not a multiple of 2" in str(caught.value)
        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]

    def test_input_signature_is_that_of_the_whole_batch(self, scale):
        @smp.step(input_signature=[tf.TensorSpec([4, 1])])
        def forward(x):
            assert x.shape.as_list() == [2, 1]
            return scale(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]
        with pytest.raises(TypeError):
            forward(COLUMN[:2])

    def test_input_signature_on_a_method(self, scale):
        class Trainer:
            @smp.step(input_signature=[tf.TensorSpec([None, 1])])
            def forward(self, x):
                return scale(x)

        trainer = Trainer()
        assert values(trainer.forward(COLUMN).merge()) == [[3], [6], [9], [12]]
        assert values(trainer.forward(COLUMN[:2]).merge()) == [[3], [6]]
        assert trainer.forward.experimental_get_tracing_count() == 1
        assert len(trainer.forward.schedule.orders[1]) == 2

    def test_a_method_of_an_object_that_nobody_else_holds(self, scale):
        class Trainer:
            @smp.step
            def forward(self, x):
                return scale(x)

        forward = Trainer().forward
        gc.collect()
        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]

    def test_an_object_is_not_kept_alive_by_its_step(self, scale):
        class Trainer:
            @smp.step
            def forward(self, x):
                return scale(x)

        trainer = Trainer()
        trainer.forward(COLUMN)
        gone = weakref.ref(trainer)
        del trainer
        gc.collect()
        assert gone() is None

    @pytest.mark.parametrize("how", ["unhashable", "slots"])
    def test_methods_of_unusual_objects(self, scale, how):
        class Unhashable:
            __hash__ = None

            @smp.step
            def forward(self, x):
                return scale(x)

        class Slots:
            __slots__ = ()
            forward = Unhashable.__dict__["forward"]

        trainer = {"unhashable": Unhashable, "slots": Slots}[how]()
        for _ in range(2):
            assert values(trainer.forward(COLUMN).merge()) == [[3], [6], [9], [12]]

    def test_new_shapes_are_traced_anew_and_old_ones_are_not(self, scale):
        @smp.step
        def forward(x):
            return scale(x)

        for rows in (4, 2, 4, 2):
            assert values(forward(COLUMN[:rows]).merge()) == [[3], [6], [9], [12]][:rows]
        assert forward.experimental_get_tracing_count() == 2

    def test_reduce_retracing_relaxes_the_batch(self, scale):
        @smp.step(reduce_retracing=True)
        def forward(x):
            return scale(x)

        x = tf.reshape(tf.range(64.0), [-1, 1])
        for rows in (2, 4, 8, 16, 32):
            assert values(forward(x[:rows]).merge()) == values(3 * x[:rows])
        assert forward.experimental_get_tracing_count() == 2

    def test_autograph_turns_python_control_flow_on_tensors_into_graph_control_flow(self, scale):
        @smp.step
        def forward(x):
            total = tf.constant(0.0)
            for row in x:
                total += row[0]
            if total > 4.0:  # noqa: SIM108 # the first microbatch sums to 3, the second to 7
                sign = -1.0
            else:
                sign = 1.0
            return sign * scale(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [-9], [-12]]

    def test_autograph_reaches_the_functions_that_the_step_calls(self, scale):
        def sign(x):
            if tf.reduce_sum(x) > 4.0:
                return -1.0
            return 1.0

        @smp.step
        def forward(x):
            return sign(x) * scale(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [-9], [-12]]

    def test_autograph_off_leaves_python_as_it_is(self, scale):
        @smp.step(autograph=False)
        def forward(x):
            return -scale(x) if tf.reduce_sum(x) > 0.0 else scale(x)

        with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
            forward(COLUMN)

    def test_autograph_options_are_passed_on(self, scale):
        @smp.step(
            experimental_autograph_options=tf.autograph.experimental.Feature.EQUALITY_OPERATORS
        )
        def forward(x):
            return scale(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]

    def test_do_not_convert_is_respected(self, scale):
        @smp.step
        @tf.autograph.experimental.do_not_convert
        def forward(x):
            return scale(x) if tf.reduce_sum(x) > 0.0 else x

        with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
            forward(COLUMN)

    def test_an_error_shows_the_users_own_line(self, scale):
        @smp.step
        def forward(x):
            return scale(x) + tf.ones([7, 7])  # this very line

        with pytest.raises(ValueError, match="this very line") as caught:
            forward(COLUMN)
        assert "test_step.py" in str(caught.value)

    def test_jit_compile_is_possible_with_one_partition(self, smp_init):
        smp_init({"partitions": 1, "microbatches": 2})
        model = Scale(3.0, partition=0)

        @smp.step(jit_compile=True)
        def forward(x):
            return model(x)

        assert values(forward(COLUMN).merge()) == [[3], [6], [9], [12]]

    def test_get_concrete_function(self, scale):
        @smp.step
        def forward(x):
            return scale(x)

        concrete = forward.get_concrete_function(tf.TensorSpec([None, 1]))
        assert values(concrete(COLUMN).merge()) == [[3], [6], [9], [12]]


class TestArguments:
    def test_called_inside_a_tf_function(self, scale):
        @smp.step
        def forward(x):
            return scale(x)

        @tf.function
        def outer(x):
            y = forward(x)
            if tf.reduce_sum(y.merge()) > 0.0:
                return y.merge() + 1.0
            return y.merge()

        assert values(outer(COLUMN)) == [[4], [7], [10], [13]]

    def test_called_inside_a_loop_of_a_tf_function(self, scale):
        @smp.step
        def forward(x):
            return scale(x)

        @tf.function
        def outer(x):
            for _ in tf.range(3):
                x = forward(x).merge()
                x = tf.ensure_shape(x, [4, 1])
            return x

        assert values(outer(COLUMN)) == [[27], [54], [81], [108]]

    def test_positional_keyword_default_and_rest(self, scale):
        @smp.step
        def forward(a, /, b, c=10.0, *rest, d=20.0, **named):
            sizes = [t.shape[0] for t in (a, b, *rest, *named.values()) if tf.is_tensor(t)]
            assert sizes == [2] * len(sizes)
            total = a + b + c + d
            for t in rest:
                total += t
            for t in named.values():
                total += t
            return scale(total)

        x = COLUMN
        assert values(forward(x, x)[0]) == [[96], [102]]
        assert values(forward(x, b=x)[0]) == [[96], [102]]
        assert values(forward(x, x, 0.0)[0]) == [[66], [72]]
        assert values(forward(x, x, d=0.0)[0]) == [[36], [42]]
        assert values(forward(x, x, x, x, x)[0]) == [[75], [90]]
        assert values(forward(x, x, 0.0, x, e=x, f=x, d=0.0)[0]) == [[15], [30]]

    def test_arrays_python_values_and_none(self, scale):
        @smp.step
        def forward(x, flag, number, text, nothing):
            assert tf.is_tensor(x)
            assert x.shape == (2, 1)
            assert flag is True
            assert text == "text"
            assert nothing is None
            return scale(x * number)

        assert values(forward(COLUMN.numpy(), True, 2.0, "text", None).merge()) == [
            [6],
            [12],
            [18],
            [24],
        ]

    def test_scalars_go_whole_to_every_microbatch(self, scale):
        @smp.step
        def forward(x, rate, size):
            return scale(x) * rate + size

        y = forward(COLUMN, tf.constant(2.0), np.float32(1.0))
        assert values(y.merge()) == [[7], [13], [19], [25]]

    def test_nests(self, scale):
        class Pair(NamedTuple):
            x: Any
            y: Any

        @smp.step
        def forward(nest):
            assert isinstance(nest["pair"], Pair)
            assert isinstance(nest["list"], list)
            x, (deep, flag) = nest["list"]
            assert flag is None
            return scale(x + deep + nest["pair"].x + nest["pair"].y + nest["ordered"]["x"])

        x = COLUMN
        nest = {
            "list": [x, (x, None)],
            "pair": Pair(x, 1.0),
            "ordered": collections.OrderedDict(x=x),
        }
        assert values(forward(nest).merge()) == [[15], [27], [39], [51]]

    def test_non_split_inputs(self, scale):
        @smp.step(non_split_inputs=["table", "named", "rest"])
        def forward(x, table, *rest, **others):
            assert table.shape == (3,)
            assert rest[0].shape == (5,)
            assert others["named"].shape == (7,)
            assert others["split"].shape == (2,)
            return scale(x) + table[0]

        y = forward(COLUMN, tf.ones([3]), tf.ones([5]), named=tf.ones([7]), split=tf.ones([4]))
        assert values(y.merge()) == [[4], [7], [10], [13]]

    def test_input_split_axes(self, scale):
        @smp.step(input_split_axes={"wide": 1, "named": -1})
        def forward(x, wide, **others):
            assert wide.shape == (3, 2)
            assert others["named"].shape == (3, 2)
            return scale(x) + tf.reduce_sum(wide, 0)[:, tf.newaxis]

        wide = tf.constant([[1.0, 2.0, 3.0, 4.0]] * 3)
        assert values(forward(COLUMN, wide, named=wide).merge()) == [[6], [12], [18], [24]]

    def test_objects_with_smp_slice_also_in_a_set(self, scale):
        class Rows:
            def __init__(self, start, stop):
                self.start, self.stop = start, stop

            def smp_slice(self, num_mb, mb, axis):
                each = (self.stop - self.start) // num_mb
                return Rows(self.start + mb * each, self.start + (mb + 1) * each)

            def read(self):
                return tf.range(float(self.start), float(self.stop))[:, tf.newaxis]

        @smp.step
        def forward(rows, more):
            (other,) = more
            assert isinstance(more, frozenset)
            return scale(rows.read() + other.read())

        y = forward(Rows(0, 4), frozenset([Rows(10, 14)]))
        assert values(y.merge()) == [[30], [36], [42], [48]]

    def test_a_set_argument(self, scale):
        class Rows:
            def smp_slice(self, num_mb, mb, axis):
                return mb

        @smp.step
        def forward(x, rows):
            assert type(rows) is set
            (number,) = rows
            return scale(x) + float(number)

        assert values(forward(COLUMN, {Rows()}).merge()) == [[3], [6], [10], [13]]

    def test_ragged_and_sparse_inputs(self, scale):
        @smp.step
        def forward(ragged, sparse):
            assert isinstance(ragged, tf.RaggedTensor)
            assert isinstance(sparse, tf.SparseTensor)
            return scale(
                tf.reduce_sum(ragged, 1, keepdims=True)
                + tf.reduce_sum(tf.sparse.to_dense(sparse), 1, keepdims=True)
            )

        ragged = tf.ragged.constant([[1.0], [1.0, 1.0], [], [4.0]])
        sparse = tf.sparse.from_dense([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
        assert values(forward(ragged, sparse).merge()) == [[6], [6], [6], [33]]

    def test_a_keras_variable_and_a_model_as_arguments(self, scale):
        @smp.step
        def forward(model, x, shift):
            return model(x) + shift

        shift = keras.Variable(1.0)
        assert values(forward(scale, COLUMN, shift).merge()) == [[4], [7], [10], [13]]

    def test_a_dataset_of_batches(self, scale):
        @smp.step
        def forward(x, y):
            return scale(x) + y

        dataset = tf.data.Dataset.from_tensor_slices((COLUMN, COLUMN)).batch(2)
        results = [values(forward(x, y).merge()) for x, y in dataset]
        assert results == [[[4], [8]], [[12], [16]]]


class TestResults:
    def test_every_tensor_of_a_nest_comes_back_as_a_step_output(self, scale):
        class Pair(NamedTuple):
            left: Any
            right: Any

        @smp.step
        def forward(x):
            y = scale(x)
            return {"list": [y, (y, None)], "pair": Pair(y, x), "loss": tf.reduce_sum(y)}

        result = forward(COLUMN)
        assert isinstance(result["list"], list)
        assert isinstance(result["list"][1], tuple)
        assert result["list"][1][1] is None
        assert isinstance(result["pair"], Pair)
        for output in (result["list"][0], result["list"][1][0], result["pair"].left):
            assert isinstance(output, smp.StepOutput)
            assert values(output.merge()) == [[3], [6], [9], [12]]
        assert values(result["pair"].right.merge()) == values(COLUMN)
        assert [float(t) for t in result["loss"].outputs] == [9.0, 21.0]

    def test_python_numbers_arrays_and_strings_come_back_as_tensors(self, scale):
        @smp.step
        def forward(x):
            return scale(x), 7, 2.5, True, "text", np.arange(2)

        _, number, fraction, flag, text, array = forward(COLUMN)
        assert [values(t) for t in number] == [7, 7]
        assert [values(t) for t in fraction] == [2.5, 2.5]
        assert [values(t) for t in flag] == [True, True]
        assert [t.numpy() for t in text] == [b"text", b"text"]
        assert values(array.merge()) == [0, 1, 0, 1]

    def test_variables_come_back_as_their_values(self, scale):
        plain = tf.Variable([1.0, 2.0])

        @smp.step
        def forward(x):
            return scale(x), scale.factor, plain

        _, factor, other = forward(COLUMN)
        assert [float(t) for t in factor] == [3.0, 3.0]
        assert values(other.stack()) == [[1.0, 2.0], [1.0, 2.0]]

    def test_sparse_gradients_come_back_sparse(self, smp_init):
        smp_init(TWO_BY_TWO)

        class Embeds(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.embed = keras.layers.Embedding(5, 2)

            def call(self, x):
                with smp.partition(1):
                    return self.embed(x)

        model = Embeds()

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            return tape.gradient(loss, model.trainable_variables)

        (gradient,) = gradients(tf.constant([0, 1, 1, 4]))
        assert all(isinstance(part, tf.IndexedSlices) for part in gradient)
        dense = tf.convert_to_tensor(gradient.reduce_sum())
        assert values(dense) == [[1, 1], [2, 2], [0, 0], [0, 0], [1, 1]]

    def test_ragged_and_sparse_results(self, scale):
        @smp.step
        def forward(x):
            y = scale(x)
            return tf.RaggedTensor.from_tensor(y), tf.sparse.from_dense(y)

        ragged, sparse = forward(COLUMN)
        assert ragged.merge().to_list() == [[3], [6], [9], [12]]
        assert values(tf.sparse.to_dense(sparse.merge())) == [[3], [6], [9], [12]]

    def test_gradients_are_reduced_on_the_device_of_their_variable(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            return tape.gradient(loss, model.trainable_variables)

        found = [g.accumulate() for g in gradients(batch(4))]
        assert [device_index(g) for g in found] == [0, 0, 1, 1]
        assert [device_index(v.value) for v in model.trainable_variables] == [0, 0, 1, 1]

    def test_a_step_output_leaves_a_tf_function_and_passes_through_nest(self, scale):
        @smp.step
        def forward(x):
            return scale(x), x

        @tf.function
        def outer(x):
            return {"both": forward(x)}

        y, x = outer(COLUMN)["both"]
        assert isinstance(y, smp.StepOutput)
        assert values(y.merge()) == [[3], [6], [9], [12]]
        flat = tf.nest.flatten([y, x], expand_composites=True)
        assert len(flat) == 4
        again, _ = tf.nest.pack_sequence_as([y, x], flat, expand_composites=True)
        assert values(again.reduce_sum()) == [[12], [18]]

    def test_different_structures_are_an_error(self, scale):
        counter = iter(range(10))

        @smp.step
        def forward(x):
            return [scale(x)] * (1 + next(counter))

        with pytest.raises(StepError, match="other structures for different microbatches"):
            forward(COLUMN)

    def test_none_in_some_microbatches_only_is_an_error(self, scale):
        counter = iter(range(10))

        @smp.step
        def forward(x):
            return scale(x), (None if next(counter) % 2 else x)

        with pytest.raises(StepError, match="other structures for different microbatches"):
            forward(COLUMN)

    @pytest.mark.parametrize("leaf", [object(), keras.losses.MeanSquaredError()])
    def test_what_cannot_be_a_tensor_is_an_error_that_names_it(self, scale, leaf):
        @smp.step
        def forward(x):
            return scale(x), leaf

        with pytest.raises(StepError, match=type(leaf).__name__):
            forward(COLUMN)


class TestState:
    def test_metrics_updated_inside_are_as_after_a_plain_loop(self, smp_init):
        smp_init(TWO_BY_FOUR)
        model = Net(units=3)
        inside = [
            keras.metrics.SparseCategoricalAccuracy(),
            keras.metrics.Mean(),
            keras.metrics.AUC(num_thresholds=11, from_logits=True, multi_label=False),
        ]
        outside = [type(m).from_config(m.get_config()) for m in inside]

        @smp.step
        def forward(x, y):
            logits = model(x)
            inside[0].update_state(y, logits)
            inside[1].update_state(tf.reduce_mean(logits))
            inside[2].update_state(tf.one_hot(y, 3), logits)
            return logits

        rng = np.random.default_rng(0)
        for seed in range(3):
            x, y = batch(8, seed=seed), tf.constant(rng.integers(0, 3, 8))
            for part, labels in zip(forward(x, y), tf.split(y, 4), strict=True):
                outside[0].update_state(labels, part)
                outside[1].update_state(tf.reduce_mean(part))
                outside[2].update_state(tf.one_hot(labels, 3), part)
        for ours, theirs in zip(inside, outside, strict=True):
            assert float(ours.result()) == float(theirs.result())
            for a, b in zip(ours.variables, theirs.variables, strict=True):
                np.testing.assert_array_equal(a.numpy(), b.numpy())

    def test_variables_assigned_inside_change_once_per_microbatch_in_order(self, scale):
        count = tf.Variable(0, trainable=False)
        log = tf.Variable(tf.zeros([0, 1]), shape=[None, 1], trainable=False)

        @smp.step
        def forward(x):
            count.assign_add(1)
            y = scale(x)
            log.assign(tf.concat([log, y], 0))
            return y, count.read_value()

        _, counts = forward(COLUMN)
        assert int(count) == 2
        assert [int(c) for c in counts] == [1, 2]
        assert values(log) == [[3], [6], [9], [12]]

    def test_random_numbers_differ_between_microbatches_and_calls(self, scale):
        generator = tf.random.Generator.from_seed(1)
        seeds = keras.random.SeedGenerator(2)

        @smp.step
        def forward(x):
            shape = [1]
            return (
                scale(x),
                generator.normal(shape),
                keras.random.normal(shape, seed=seeds),
                tf.random.normal(shape),
            )

        first, second = forward(COLUMN)[1:], forward(COLUMN)[1:]
        for a, b in zip(first, second, strict=True):
            assert len({float(t[0]) for t in (*a, *b)}) == 4

    def test_prints_and_assertions_of_the_step_function_run_for_every_microbatch(
        self, scale, capfd
    ):
        @smp.step
        def forward(x):
            tf.print("rows", x[:, 0])
            tf.debugging.assert_less(x, 4.5)
            return scale(x)

        forward(COLUMN)
        printed = capfd.readouterr().err.split("\n")
        assert [line for line in printed if "rows" in line] == ["rows [1 2]", "rows [3 4]"]
        with pytest.raises(tf.errors.InvalidArgumentError):
            forward(COLUMN + 1.0)


class TestModels:
    def test_teacher_and_student_in_one_step(self, smp_init):
        smp_init(TWO_BY_TWO)
        teacher, student = Scale(5.0, partition=0), Scale(2.0, partition=1)

        @smp.step
        def distil(x):
            target = tf.stop_gradient(teacher(x))
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(student(x) - target))
            return tape.gradient(loss, student.trainable_variables), loss

        (gradient,), loss = distil(COLUMN)
        assert [float(t) for t in loss] == [9.0 * 5, 9.0 * 25]
        assert [float(t) for t in gradient] == [-6.0 * 5, -6.0 * 25]
        assert [device_index(m.factor.value) for m in (teacher, student)] == [0, 1]

    def test_one_model_called_twice_in_one_step(self, scale):
        @smp.step
        def twice(x):
            with tf.GradientTape() as tape:
                y = scale(scale(x))
                loss = tf.reduce_sum(y)
            return y, tape.gradient(loss, scale.trainable_variables)

        y, (gradient,) = twice(COLUMN)
        assert values(y.merge()) == [[9], [18], [27], [36]]
        assert [float(t) for t in gradient] == [6.0 * 3, 6.0 * 7]

    def test_gradients_of_two_models_at_once(self, smp_init):
        smp_init(TWO_BY_TWO)
        first, second = Scale(2.0, partition=0), Scale(3.0, partition=1)

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(second(first(x)))
            return tape.gradient(loss, [first.factor, second.factor])

        first_gradient, second_gradient = gradients(COLUMN)
        assert [float(t) for t in first_gradient] == [9.0, 21.0]
        assert [float(t) for t in second_gradient] == [6.0, 14.0]

    def test_train_and_test_steps_share_one_model(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net(units=1)
        optimizer = keras.optimizers.SGD(0.1)

        @smp.step
        def train(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            return tape.gradient(loss, model.trainable_variables), loss

        @smp.step
        def test(x, y):
            return tf.reduce_mean(tf.square(model(x, training=False) - y))

        x, y = batch(8), tf.reduce_sum(batch(8), 1, keepdims=True)
        before = float(test(x, y).reduce_mean())
        for _ in range(20):
            gradients, loss = train(x, y)
            gradients = [g.accumulate() for g in gradients]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        after = float(test(x, y).reduce_mean())
        assert after < 0.5 * before
        assert float(loss.reduce_mean()) == pytest.approx(after, rel=0.3)
        smaller = float(test(x[:4], y[:4]).reduce_mean())  # another shape, the same weights
        expected = tf.reduce_mean(tf.square(model(x[:4]) - y[:4]))
        assert smaller == pytest.approx(float(expected), rel=1e-6)

    def test_a_whole_training_function_with_schedule_clipping_and_metrics(self, smp_init):
        smp_init(TWO_BY_FOUR)
        keras.utils.set_random_seed(3)
        model, reference = Net(units=1), plain_net(units=1)

        def make() -> Any:
            rate = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
            return keras.optimizers.Adam(rate)

        ours, theirs = make(), make()

        @smp.step
        def forward_backward(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            return tape.gradient(loss, model.trainable_variables), loss

        @tf.function
        def train(x, y):
            gradients, loss = forward_backward(x, y)
            gradients = [g.accumulate() for g in gradients]
            gradients, norm = tf.clip_by_global_norm(gradients, 0.5)
            ours.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss.reduce_mean(), norm

        @tf.function
        def plain(x, y):
            totals, losses = None, []
            for part, labels in zip(tf.split(x, 4), tf.split(y, 4), strict=True):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(reference(part, training=True) - labels))
                found = tape.gradient(loss, reference.trainable_variables)
                totals = totals or [tf.zeros_like(g) for g in found]
                totals = [a + b for a, b in zip(totals, found, strict=True)]
                losses.append(loss)
            gradients, norm = tf.clip_by_global_norm([g / 4 for g in totals], 0.5)
            theirs.apply_gradients(zip(gradients, reference.trainable_variables, strict=True))
            return sum(losses) / 4, norm

        model(batch(8))
        reference(batch(8))
        reference.set_weights(model.get_weights())
        for seed in range(5):
            x = batch(8, seed=seed)
            y = tf.reduce_sum(x, 1, keepdims=True)
            for a, b in zip(train(x, y), plain(x, y), strict=True):
                assert float(a) == pytest.approx(float(b), rel=1e-6)
        for a, b in zip(model.get_weights(), reference.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert float(ours.learning_rate) == float(theirs.learning_rate) < 0.1


class TestGradients:
    def test_tf_gradients(self, scale):
        @smp.step
        def gradients(x):
            loss = tf.reduce_sum(scale(x))
            return tf.gradients(loss, [scale.factor.value])[0], tf.gradients(loss, [x])[0]

        factor, inputs = gradients(COLUMN)
        assert [float(t) for t in factor] == [3.0, 7.0]
        assert values(inputs.merge()) == [[3]] * 4

    def test_inputs_watched_by_a_tape(self, scale):
        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(tf.square(scale(x)))
            return tape.gradient(loss, [x, scale.factor])

        inputs, factor = gradients(COLUMN)
        assert values(inputs.merge()) == [[18], [36], [54], [72]]
        assert [float(t) for t in factor] == [6.0 * 5, 6.0 * 25]

    def test_a_persistent_tape_gives_several_gradients(self, scale):
        @smp.step
        def gradients(x):
            with tf.GradientTape(persistent=True) as tape:
                y = scale(x)
                one, two = tf.reduce_sum(y), tf.reduce_sum(tf.square(y))
            results = [tape.gradient(loss, scale.factor) for loss in (one, two, one)]
            del tape
            return results

        one, two, again = gradients(COLUMN)
        assert [float(t) for t in one] == [3.0, 7.0]
        assert [float(t) for t in two] == [6.0 * 5, 6.0 * 25]
        assert [float(t) for t in again] == [3.0, 7.0]

    def test_output_gradients_are_passed_on(self, scale):
        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                y = scale(x)
            return tape.gradient(y, scale.factor, output_gradients=2.0 * tf.ones_like(y))

        assert [float(t) for t in gradients(COLUMN)] == [6.0, 14.0]

    def test_an_unconnected_gradient_is_none_as_in_plain_keras(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        other = tf.Variable(1.0)

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                y = model(x)
                loss = tf.reduce_sum(y)
            nothing = tape.gradient(loss, [other])
            return y, nothing

        assert gradients(batch(4))[1] == [None]

    def test_unconnected_gradients_as_zeros(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        other = tf.Variable(1.0)

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            return tape.gradient(
                loss, [model.top.bias, other], unconnected_gradients=tf.UnconnectedGradients.ZERO
            )

        bias, zero = gradients(batch(4))
        assert values(bias.reduce_sum()) == [4.0] * 3
        assert values(zero.merge()) == [0.0, 0.0]

    def test_stop_gradient_between_two_calls(self, scale):
        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(scale(tf.stop_gradient(scale(x))))
            return tape.gradient(loss, scale.factor)

        assert [float(t) for t in gradients(COLUMN)] == [9.0, 21.0]

    def test_a_tape_that_does_not_watch_leaves_the_gradient_none(self, scale):
        @smp.step
        def gradients(x):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                y = scale(x)
            return y, tape.gradient(y, [x, scale.factor])

        _, (inputs, factor) = gradients(COLUMN)
        assert values(inputs.merge()) == [[3]] * 4
        assert factor is None

    def test_a_microbatch_may_use_the_gradients_of_its_own_step(self, scale):
        @smp.step
        def penalty(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = scale(x)
            gradient = tape.gradient(y, x)
            return tf.reduce_sum(y), tf.norm(gradient)

        total, norm = penalty(COLUMN)
        assert [float(t) for t in total] == [9.0, 21.0]
        assert [float(t) for t in norm] == pytest.approx([18.0**0.5] * 2)


class TestWorlds:
    def test_a_step_is_compiled_anew_for_another_configuration(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Scale(3.0)

        @smp.step
        def forward(x):
            return model(x)

        assert len(forward(COLUMN)) == 2
        smp_init({**MANUAL, "partitions": 3, "microbatches": 4})
        assert len(forward(COLUMN)) == 4
        smp_init({"partitions": 1, "microbatches": 1})
        model.partition = 0
        assert values(forward(COLUMN)[0]) == [[3], [6], [9], [12]]

    @pytest.mark.parametrize("pipeline", ["simple", "interleaved"])
    def test_the_configured_schedule_is_the_one_that_runs(self, smp_init, pipeline):
        smp_init({**TWO_BY_FOUR, "pipeline": pipeline})
        model = Net()

        @smp.step
        def gradients(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(x)))
            return tape.gradient(loss, model.trainable_variables)

        gradients(batch(8))
        first, last = [[str(a) for a in order] for order in gradients.schedule.orders]
        assert gradients.schedule.name == pipeline
        expected = {
            "simple": "1F0 1F1 1F2 1F3 1B0 1W0 1B1 1W1 1B2 1W2 1B3 1W3",
            "interleaved": "1F0 1B0 1W0 1F1 1B1 1W1 1F2 1B2 1W2 1F3 1B3 1W3",
        }
        assert " ".join(last) == expected[pipeline]
        assert sorted(first) == sorted(f"0{k}{m}" for k in "FB" for m in range(4))


def test_nothing_of_a_step_stays_when_its_function_is_gone(smp_init):
    smp_init(TWO_BY_TWO)
    traced = []

    def train():
        model = smp.DistributedModel.from_keras(keras.Sequential([keras.layers.Dense(2)]))

        @smp.step
        def forward_backward(x):
            traced.append(weakref.ref(tf.compat.v1.get_default_graph()))
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(x))
            return tape.gradient(loss, model.trainable_variables)

        forward_backward(tf.ones([2, 3]))

    train()
    gc.collect()
    assert len(traced) >= 2
    assert [graph() for graph in traced] == [None] * len(traced)


def test_a_step_as_an_argument_of_a_function_is_the_step(smp_init):
    smp_init(TWO_BY_TWO)
    scale = Scale(3.0)

    @smp.step
    def forward(x):
        return scale(x)

    class Holder:
        @smp.step
        def forward(self, x):
            return scale(x)

    @tf.function
    def around(step, x):
        return step(x).stack()

    x = tf.ones((4, 1))
    assert around(forward, x).shape == forward(x).stack().shape
    assert around(Holder().forward, x).shape == forward(x).stack().shape
    assert list(inspect.signature(forward).parameters) == ["x"]
    assert list(inspect.signature(Holder().forward).parameters) == ["x"]
