from __future__ import annotations

import keras
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.distributed import world
from opensmp.saving.checkpoint.contents import Place
from opensmp.saving.checkpoint.restoring.restore import DamagedError, is_eager, restore_from


@pytest.fixture
def path(smp_init, tmp_path):
    smp_init({"partitions": 1})
    checkpoint = tf.train.Checkpoint(a=tf.Variable([1.0, 2.0]), b=tf.Variable(3.0))
    return checkpoint.write(str(tmp_path / "c"))


def restore(path, partial=False, **objects):
    checkpoint = tf.train.Checkpoint(**objects)
    return restore_from(path, checkpoint, world.current(), Place(0, 0), partial=partial)


def test_plain_checkpoints_are_restored(path):
    a, b = tf.Variable([0.0, 0.0]), tf.Variable(0.0)
    restore(path, a=a, b=b)
    assert (a.numpy().tolist(), float(b)) == ([1.0, 2.0], 3.0)


def test_nothing_is_assigned_if_one_value_is_damaged(path, tmp_path):
    (data,) = tmp_path.glob("c.data*")
    content = bytearray(data.read_bytes())
    content[8] ^= 1  # of b
    data.write_bytes(content)
    a, b = tf.Variable([0.0, 0.0]), tf.Variable(0.0)
    with pytest.raises(DamagedError, match="was not restored"):
        restore(path, a=a, b=b)
    assert (a.numpy().tolist(), float(b)) == ([0.0, 0.0], 0.0)


def test_what_is_not_there_is_an_error_unless_partial(path):
    a, c = tf.Variable([0.0, 0.0]), tf.Variable(9.0)
    with pytest.raises(smp.CheckpointError, match=r"1 are not in the checkpoint:\s+c: "):
        restore(path, a=a, c=c)
    assert a.numpy().tolist() == [0.0, 0.0]
    restore(path, partial=True, a=a, c=c)
    assert (a.numpy().tolist(), float(c)) == ([1.0, 2.0], 9.0)


def test_a_checkpoint_of_none_of_the_objects_is_an_error(path):
    with pytest.raises(smp.CheckpointError, match=r"None of its values belongs .* It has: .*a/"):
        restore(path, partial=True, x=tf.Variable(1.0))


def test_random_seeds_that_are_not_there_are_a_warning(path):
    generator = keras.random.SeedGenerator(1)
    with pytest.warns(UserWarning, match=r"no values for 1 random seeds"):
        restore(path, a=tf.Variable([0.0, 0.0]), b=tf.Variable(0.0), seed=generator.state)


def test_inside_of_a_graph_it_is_refused():
    with pytest.raises(smp.CheckpointError, match=r"Call it outside of tf\.function"):
        tf.function(lambda: is_eager("smp.CheckpointManager.save"), autograph=False)()
