"""The code of "Why Machine Learning Engineers Should Use Decorators".

It is of TensorFlow 1.14 and Keras 2.3: `lr` and `decay` of optimizers are accepted where the
compatibility face was imported. MNIST is replaced by random pictures of 8 x 8, and the name of
the author's machine by this one's.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.layers import Convolution2D, Dense, Dropout, Flatten, Input, MaxPooling2D
from keras.losses import categorical_crossentropy
from keras.models import Model, load_model
from keras.optimizers import SGD

import smdistributed.modelparallel.tensorflow as smp

IMG_ROWS = IMG_COLS = 8
IMG_SHAPE = (IMG_ROWS, IMG_COLS, 1)
NUM_CLASSES, KERNEL_SIZE, BATCH_SIZE = 10, 3, 8
LEARN_RATE, DECAY, MOMENTUM = 0.01, 1e-3, 0.9
PC, USE_MULTI_GPU = "AiDA-1", True
DEVICES = ["CPU:0", "CPU:1"]


class mnist:
    """Stands in for keras.datasets.mnist."""

    @staticmethod
    def load_data():
        rng = np.random.default_rng(0)

        def part(count):
            pictures = rng.integers(0, 256, (count, IMG_ROWS, IMG_COLS)).astype("uint8")
            return pictures, rng.integers(0, 10, count)

        return part(36), part(12)


def mirrored():
    # tf.distribute.MirroredStrategy() has one replica on a machine without GPUs.
    return tf.distribute.MirroredStrategy(
        DEVICES, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def load_minst_data():
    # the data, split between train and test sets
    (x_train, y_train), (x_test, y_test) = mnist.load_data()

    # make into data
    x_train = x_train.reshape(x_train.shape[0], IMG_ROWS, IMG_COLS, 1)
    x_test = x_test.reshape(x_test.shape[0], IMG_ROWS, IMG_COLS, 1)

    x_train = x_train.astype("float32")
    x_test = x_test.astype("float32")
    x_train /= 255
    x_test /= 255

    # convert class vectors to binary class matrices
    y_train = keras.utils.to_categorical(y_train, NUM_CLASSES)
    y_test = keras.utils.to_categorical(y_test, NUM_CLASSES)

    # return data
    return x_train, y_train, x_test, y_test


def make_datasets(x_input, y_input, batch_size=BATCH_SIZE, buffer=None):
    # if we don't have set buffer size, use all x_input size
    if not buffer:
        buffer = x_input.shape[0]

    # return dataset
    return (
        tf.data.Dataset.from_tensor_slices((x_input, y_input))
        .shuffle(buffer)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )


def calculate_train_and_valid_steps(buffer_size, batch_size):
    # train number of steps
    if buffer_size % batch_size != 0:
        num_of_steps = buffer_size // batch_size + 1
    else:
        num_of_steps = buffer_size // batch_size

    # find ceiling
    num_of_steps = np.ceil(num_of_steps).astype("int")

    return num_of_steps


def cnn_model():
    # define model
    # conv layers
    inputs = Input(IMG_SHAPE, name="input")
    conv_1 = Convolution2D(32, KERNEL_SIZE, padding="same", activation="relu", name="conv_1")(
        inputs
    )
    conv_2 = Convolution2D(64, KERNEL_SIZE, padding="same", activation="relu", name="conv_2")(
        conv_1
    )
    max_pool = MaxPooling2D(pool_size=(2, 2), name="Maxpooling")(conv_2)

    # dense and dropout layers
    drop_1 = Dropout(0.25, name="drop_1")(max_pool)
    flat = Flatten(name="flat")(drop_1)
    dense_1 = Dense(128, name="dense_1")(flat)
    drop_2 = Dropout(0.5, name="drop_2")(dense_1)
    out = Dense(NUM_CLASSES, activation="softmax", name="out")(drop_2)

    # define model
    model = Model(inputs=inputs, outputs=out)

    # compile model
    model.compile(
        loss=categorical_crossentropy,
        optimizer=SGD(
            lr=float(LEARN_RATE),
            decay=float(DECAY),
            momentum=MOMENTUM,
        ),
        metrics=["accuracy"],
    )

    # return model
    return model


def load_model_with_scope(model_func):
    def wrapper(*args, **kwargs):
        # determine if we use multiple GPUs
        if PC == "AiDA-1" and USE_MULTI_GPU:
            # create a MirroredStrategy and open scope
            strategy = mirrored()
            with strategy.scope():
                model = model_func(*args, **kwargs)
        # not using multiple GPUs
        else:
            model = model_func(*args, **kwargs)
        return model

    return wrapper


def load_model_with_weights(prev_model_path):
    def wrap(model_func):
        def wrapper(*args, **kwargs):
            with tf.device("/cpu:0"):
                # load model
                # (its loss is a function, which plain Keras cannot read from the file any more)
                prev_model = load_model(prev_model_path, compile=False)
                prev_weights = prev_model.get_weights()

                # clean up so we don't overallocate space
                del prev_model

            # load model and set weights
            model = model_func(*args, **kwargs)
            model.set_weights(prev_weights)
            return model

        return wrapper

    return wrap


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The model that the first part trains and saves, and the path of its file."""
    path = str(tmp_path_factory.mktemp("seed") / "model.h5")
    x_train, y_train, *_ = load_minst_data()
    train_dataset = make_datasets(x_train, y_train)
    train_parallel_steps = calculate_train_and_valid_steps(x_train.shape[0], BATCH_SIZE)
    with mirrored().scope():
        model = cnn_model()
    model.fit(train_dataset, steps_per_epoch=int(train_parallel_steps), verbose=0)
    model.save(path)
    return model.get_weights(), path


def assert_equal(weights, others):
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_failed_in_the_seed_works_now_a_model_is_loaded_in_a_scope(earlier):
    weights, path = earlier
    with mirrored().scope():
        model = smp.load_model(path)  # bad_load_model.py
    assert_equal(model.get_weights(), weights)
    assert len(model.weights[0].value.values) == 2
    assert int(np.asarray(model.optimizer.iterations)) == 5
    x_train, y_train, *_ = load_minst_data()
    model.fit(x_train, y_train, batch_size=BATCH_SIZE, verbose=0)


def test_the_decorators_of_the_seed_work_in_its_order(earlier):
    weights, path = earlier
    model = load_model_with_weights(path)(load_model_with_scope(cnn_model))()
    assert_equal(model.get_weights(), weights)


def test_our_decorators_work_in_either_order(earlier):
    weights, path = earlier
    scope, pretrained = smp.scope(DEVICES), smp.pretrained_weights(path)
    for make in (scope(pretrained(cnn_model)), pretrained(scope(cnn_model))):
        assert make.__name__ == "cnn_model"
        model = make()
        assert_equal(model.get_weights(), weights)
        assert len(model.weights[0].value.values) == 2


def test_with_opensmp_the_same_function_makes_a_split_model(smp_init, earlier):
    weights, path = earlier
    smp_init({"partitions": 2, "microbatches": 2})

    @smp.scope()
    @smp.pretrained_weights(path)
    def split_model():
        return cnn_model()

    @smp.distributed_dataset(batch_size=BATCH_SIZE, shuffle=True, repeat=True)
    def training_data():
        return load_minst_data()[:2]

    model = split_model()
    assert_equal(model.get_weights(), weights)
    train_dataset, train_parallel_steps = training_data()
    assert train_parallel_steps == calculate_train_and_valid_steps(36, BATCH_SIZE)
    model.fit(train_dataset, steps_per_epoch=train_parallel_steps, verbose=0)
    assert len({v.value.device for v in model.weights}) == 2
    assert int(model.optimizer.iterations) == 5
