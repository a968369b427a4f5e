from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from opensmp.api.step.split import split_arguments
from opensmp.errors import StepError


def split(value: Any, num_microbatches: int = 2, axis: int = 0) -> list[Any]:
    """The parts of one argument."""
    parts = split_arguments({"x": value}, num_microbatches, input_split_axes={"x": axis})
    return [part["x"] for part in parts]


class Pair(NamedTuple):
    left: Any
    right: Any


class SlicesItself:
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> tuple[str, int, int, int]:
        return ("part", num_mb, mb, axis)


class TestTensors:
    def test_a_tensor_is_split_along_its_first_axis_in_order(self):
        parts = split(tf.constant([[1, 2], [3, 4], [5, 6], [7, 8]]))
        assert [part.numpy().tolist() for part in parts] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]

    def test_an_array_becomes_tensors_of_its_dtype(self):
        parts = split(np.arange(4, dtype=np.float64))
        assert all(tf.is_tensor(part) for part in parts)
        assert [part.dtype for part in parts] == [tf.float64, tf.float64]
        assert [part.numpy().tolist() for part in parts] == [[0.0, 1.0], [2.0, 3.0]]

    @pytest.mark.parametrize("axis", [1, -1])
    def test_another_axis(self, axis):
        parts = split(tf.constant([[1, 2], [3, 4]]), axis=axis)
        assert [part.numpy().tolist() for part in parts] == [[[1], [3]], [[2], [4]]]

    def test_a_string_tensor_is_split(self):
        assert [part.numpy().tolist() for part in split(tf.constant(["a", "b"]))] == [
            [b"a"],
            [b"b"],
        ]

    @pytest.mark.parametrize("scalar", [tf.constant(3.0), np.array(3.0), np.float32(3.0)])
    def test_a_scalar_goes_to_every_microbatch_whole(self, scalar):
        assert [float(part) for part in split(scalar)] == [3.0, 3.0]

    @pytest.mark.parametrize("value", [None, True, 3, 2.5, "text", b"bytes", object()])
    def test_what_is_no_tensor_goes_to_every_microbatch_as_it_is(self, value):
        assert all(part is value for part in split(value))

    def test_one_microbatch_gets_the_very_tensor(self):
        value = tf.constant([1, 2, 3])
        (part,) = split(value, num_microbatches=1)
        assert part is value

    def test_a_variable_is_not_a_batch_and_stays_whole(self):
        variable = tf.Variable([1.0, 2.0])
        assert all(part is variable for part in split(variable))


class TestNests:
    def test_every_container_keeps_its_type(self):
        x = tf.constant([1, 2])
        nest = {"a": [x, (x, None)], "b": Pair(x, "text"), "c": collections.OrderedDict(d=x)}
        for i, part in enumerate(split(nest)):
            assert list(part) == ["a", "b", "c"]
            assert isinstance(part["a"], list)
            assert isinstance(part["a"][1], tuple)
            assert part["a"][1][1] is None
            assert isinstance(part["b"], Pair)
            assert part["b"].right == "text"
            assert isinstance(part["c"], collections.OrderedDict)
            for tensor in (part["a"][0], part["a"][1][0], part["b"].left, part["c"]["d"]):
                assert tensor.numpy().tolist() == [i + 1]

    def test_a_defaultdict_becomes_a_dict_of_parts(self):
        nest = collections.defaultdict(list, x=tf.constant([1, 2]))
        assert [part["x"].numpy().tolist() for part in split(nest)] == [[1], [2]]

    @pytest.mark.parametrize("kind", [set, frozenset])
    def test_a_set_of_what_slices_itself_stays_a_set(self, kind):
        parts = split(kind([SlicesItself([1, 2])]), num_microbatches=2)
        assert parts == [kind([("part", 2, 0, 0)]), kind([("part", 2, 1, 0)])]

    def test_an_object_with_smp_slice_is_asked_for_each_part_with_its_axis(self):
        parts = split({"deep": [SlicesItself([1])]}, num_microbatches=3, axis=1)
        assert [part["deep"][0] for part in parts] == [("part", 3, i, 1) for i in range(3)]

    def test_a_class_with_smp_slice_is_a_value_and_not_asked(self):
        assert split(SlicesItself) == [SlicesItself, SlicesItself]

    def test_non_split_inputs_go_whole_to_every_microbatch(self):
        mask = [tf.constant([1, 2, 3])]
        parts = split_arguments({"mask": mask}, 2, non_split_inputs=["mask"])
        assert all(part["mask"] is mask for part in parts)

    def test_empty_containers_stay_empty(self):
        assert split({"a": [], "b": (), "c": {}}) == [{"a": [], "b": (), "c": {}}] * 2


class TestRaggedAndSparse:
    def test_a_ragged_tensor_is_split_by_rows(self):
        parts = split(tf.ragged.constant([[1], [2, 3], [], [4, 5, 6]]))
        assert [part.to_list() for part in parts] == [[[1], [2, 3]], [[], [4, 5, 6]]]

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_a_sparse_tensor_is_split_along_any_axis(self, axis):
        dense = np.array([[1, 0, 0, 2], [0, 3, 0, 0]])
        parts = split(tf.sparse.from_dense(dense), axis=axis)
        for part, expected in zip(parts, np.split(dense, 2, axis), strict=True):
            np.testing.assert_array_equal(tf.sparse.to_dense(part).numpy(), expected)

    def test_a_ragged_tensor_has_no_other_axis(self):
        with pytest.raises(StepError, match="'x' is ragged and can be split along axis 0 only"):
            split(tf.ragged.constant([[1], [2]]), axis=1)

    @pytest.mark.parametrize("make", [tf.ragged.constant, tf.sparse.from_dense])
    def test_rows_that_do_not_divide_are_an_error(self, make):
        with pytest.raises(StepError, match=r"'x' has 3 entries along axis 0.*multiple of 2"):
            split(make([[1], [2], [3]]))

    @pytest.mark.parametrize("make", [tf.ragged.constant, tf.sparse.from_dense])
    def test_one_microbatch_gets_the_very_value(self, make):
        value = make([[1], [2], [3]])
        assert split(value, num_microbatches=1)[0] is value

    def test_rows_that_do_not_divide_are_an_error_when_first_known_at_run_time(self):
        @tf.function(
            input_signature=[
                tf.RaggedTensorSpec([None, None], tf.int32),
                tf.SparseTensorSpec([None, 1], tf.int32),
            ],
            autograph=False,
        )
        def run(ragged, sparse):
            return split(ragged), split(sparse)

        fine, odd = [[1], [2]], [[1], [2], [3]]
        ragged, sparse = run(tf.ragged.constant(fine), tf.sparse.from_dense(fine))
        assert [part.to_list() for part in ragged] == [[[1]], [[2]]]
        assert [tf.sparse.to_dense(part).numpy().tolist() for part in sparse] == [[[1]], [[2]]]
        for arguments in (
            (tf.ragged.constant(odd), tf.sparse.from_dense(fine)),
            (tf.ragged.constant(fine), tf.sparse.from_dense(odd)),
        ):
            with pytest.raises(tf.errors.InvalidArgumentError, match="into 2 microbatches"):
                run(*arguments)


class TestFaults:
    def test_all_arguments_that_do_not_divide_are_named_at_once_with_both_numbers(self):
        with pytest.raises(StepError) as caught:
            split_arguments({"a": tf.ones([5, 2]), "b": [np.ones(7)], "c": tf.ones([4])}, 4)
        message = str(caught.value)
        assert "argument 'a' has 5 entries along axis 0, which is not a multiple of 4" in message
        assert "argument 'b' has 7 entries along axis 0, which is not a multiple of 4" in message
        assert "argument 'c'" not in message
        assert "Use a batch size that is a multiple of 4, change 'microbatches'" in message
        assert "non_split_inputs" in message

    @pytest.mark.parametrize("make", [tf.ones, lambda s: tf.sparse.from_dense(tf.ones(s))])
    @pytest.mark.parametrize("axis", [2, -3])
    def test_an_axis_that_is_not_there(self, axis, make):
        with pytest.raises(StepError, match=f"argument 'x' of rank 2 has no axis {axis}"):
            split(make([2, 2]), axis=axis)

    def test_an_unknown_rank_is_an_error_that_asks_for_the_shape(self):
        @tf.function(input_signature=[tf.TensorSpec(None)], autograph=False)
        def run(x):
            return split(x)

        with pytest.raises(StepError, match="'x' has an unknown rank; give it a shape"):
            run(tf.ones([2]))

    def test_a_size_first_known_at_run_time_is_checked_then(self):
        @tf.function(input_signature=[tf.TensorSpec([None])], autograph=False)
        def run(x):
            return split(x, num_microbatches=4)

        assert [float(part[0]) for part in run(tf.range(4.0))] == [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            run(tf.range(6.0))
        message = str(caught.value)
        assert "the batch cannot be split into 4 microbatches" in message
        assert "Argument \\'x\\' must have a multiple of 4 entries, received:" in message
        assert "6" in message.split("received:")[1]

    def test_different_sizes_are_split_with_one_warning_that_names_them(self, caplog):
        with caplog.at_level("WARNING", logger="opensmp"):
            split_arguments({"x": tf.ones([4]), "table": tf.ones([6])}, 2)
        (record,) = caplog.records
        assert "x=4, table=6" in record.getMessage()
        assert "non_split_inputs" in record.getMessage()

    def test_an_empty_batch_is_divided_into_empty_microbatches(self):
        assert [part.shape.as_list() for part in split(tf.ones([0, 3]))] == [[0, 3], [0, 3]]
