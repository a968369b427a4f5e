from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.compat import horovod as hvd
from opensmp.errors import CommunicationError, NotInitializedError


@pytest.fixture(autouse=True)
def _initialised(smp_init):
    smp_init({"partitions": 2})


def test_ranks_of_one_process():
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
    assert hvd.init() is None


@pytest.mark.parametrize("name", ["rank", "size", "local_rank", "local_size"])
def test_before_init_the_error_names_what_was_called(name):
    smp.shutdown()
    with pytest.raises(NotInitializedError, match=rf"^hvd\.{name} was used before smp\.init"):
        getattr(hvd, name)()


def test_one_replica_keeps_its_tensors():
    tensor = tf.constant([1.0, 2.0])
    for result in (
        hvd.allreduce(tensor),
        hvd.allreduce(tensor, op=hvd.Sum),
        hvd.allreduce(tensor, op=hvd.Average),
        hvd.allreduce(tensor, average=False),
        hvd.allreduce(tensor, prescale_factor=2.0, postscale_factor=0.5),
    ):
        np.testing.assert_array_equal(result, tensor)


def test_all_faults_of_a_call_are_reported_at_once():
    with pytest.raises(CommunicationError) as error:
        hvd.allreduce(tf.constant(1.0), average=True, op="max", compression="fp16")
    for text in ("average and op were given both", "compression='fp16'", "op='max' is unknown"):
        assert text in str(error.value)


def test_unknown_replica_is_an_error():
    with pytest.raises(CommunicationError, match="there is no root_rank 1"):
        hvd.broadcast_variables([tf.Variable(1.0)], root_rank=1)


def test_other_names_say_what_exists():
    with pytest.raises(AttributeError, match=r"horovod\.tensorflow\.alltoall.*broadcast_variables"):
        _ = hvd.alltoall


def test_ranks_count_replicas():
    check_ranks(
        """
        import smdistributed.modelparallel.tensorflow as smp
        import horovod.tensorflow as hvd
        import numpy as np, tensorflow as tf

        hvd.init()
        smp.init({"partitions": 2, "horovod": True})
        assert (hvd.rank(), hvd.size()) == (smp.dp_rank(), 2), (hvd.rank(), hvd.size())
        assert (hvd.local_rank(), hvd.local_size()) == (smp.rank(), 4)

        x = tf.constant([1.0, 2.0]) * (hvd.rank() + 1) * (10 ** smp.mp_rank())

        @tf.function
        def step(x):
            return hvd.allreduce(x), hvd.allreduce(x, op=hvd.Sum), hvd.allreduce(x, average=False)

        unit = np.array([1.0, 2.0]) * (10 ** smp.mp_rank())
        for mean, total, old in (step(x), step.python_function(x)):
            np.testing.assert_allclose(mean, 1.5 * unit)
            np.testing.assert_allclose(total, 3 * unit)
            np.testing.assert_allclose(old, 3 * unit)

        variables = [tf.Variable(x), tf.Variable(hvd.rank() + 5)]
        tf.function(lambda: hvd.broadcast_variables(variables, root_rank=1))()
        np.testing.assert_allclose(variables[0], 2 * unit)
        assert int(variables[1]) == 6
        """,
        4,
    )


def test_factors_hold_for_integers_and_nests(smp_init):
    smp_init({"partitions": 2})
    assert hvd.allreduce(tf.constant([2, 4]), op=hvd.Sum, prescale_factor=0.5).numpy().tolist() == [
        1,
        2,
    ]
    nest = [tf.ones([2]), {"a": tf.ones([3])}, None]
    result = hvd.allreduce(nest, op=hvd.Sum, prescale_factor=3.0, postscale_factor=2.0)
    assert result[0].numpy().tolist() == [6.0, 6.0]
    assert result[1]["a"].numpy().tolist() == [6.0, 6.0, 6.0]
    assert result[2] is None


def test_process_sets_are_refused(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(CommunicationError, match="process_set is not possible"):
        hvd.allreduce(tf.ones([1]), process_set=1)
