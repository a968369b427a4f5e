"""Models whose steps call their parts, in one process."""

from __future__ import annotations

import copy
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import containers
from training.containers import PROGRAMS, ROWS, assert_same, data, mlp

import opensmp as smp
from opensmp import _private
from opensmp.api.model.model_parts import is_part
from opensmp.errors import SavingError, StepError
from opensmp.training.callbacks.rank_zero import _index_in

BY_TWO = {"partitions": 2, "microbatches": 2}
OTHERS = [(2, 1), (2, 3), (4, 4)]


def plain(model):
    return model


def fitted(kind, **options):
    keras.utils.set_random_seed(1)
    model = smp.DistributedModel.from_keras(kind())
    model.compile(keras.optimizers.SGD(0.1), **options)
    model.fit(data(), batch_size=ROWS, verbose=0)
    return model


def gan():
    keras.utils.set_random_seed(1)
    model = smp.DistributedModel.from_keras(containers.Gan())
    optimizers = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    model.compile(*optimizers, keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(data(), batch_size=ROWS, verbose=0)
    return model


def homes_of(model):
    return {weight.value.device[-5:] for weight in model.weights}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_give_the_numbers_of_plain_keras(name, smp_init):
    smp_init(BY_TWO)
    program = PROGRAMS[name]
    assert_same(program(smp.DistributedModel.from_keras), program(plain))


@pytest.mark.parametrize(("partitions", "microbatches"), OTHERS)
@pytest.mark.parametrize("name", ["vae", "contrastive"])
def test_more_partitions_and_other_microbatches(name, partitions, microbatches, smp_init):
    smp_init({"partitions": partitions, "microbatches": microbatches})
    program = PROGRAMS[name]
    assert_same(program(smp.DistributedModel.from_keras), program(plain))


def test_each_part_is_split_over_all_partitions(smp_init):
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    assert homes_of(model.encoder) == homes_of(model.decoder) == {"CPU:0", "CPU:1"}
    assert model.encoder.plan.empty == model.decoder.plan.empty == ()


def test_single_layers_go_where_least_is(smp_init):
    smp_init(BY_TWO)

    class Heads(keras.Model):
        def __init__(self):
            super().__init__()
            self.heads = [keras.layers.Dense(4) for _ in range(4)]

        def train_step(self, x):
            with tf.GradientTape() as tape:
                cost = tf.add_n([tf.reduce_mean(head(x) ** 2) for head in self.heads])
            gradients = tape.gradient(cost, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            return {"cost": cost}

    model = fitted(Heads)
    assert [homes_of(head) for head in model.heads] == [{"CPU:0"}, {"CPU:1"}] * 2


def test_plan_and_summary_tell_of_the_parts(smp_init):
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    assert list(model.plan) == ["encoder", "decoder"]
    assert model.plan["encoder"] is model.encoder.plan
    assert model.plan.num_partitions == 2
    assert "Plan of encoder over 2 partitions" in str(model.plan)
    assert "Plan of decoder over 2 partitions" in str(model.plan)
    lines = []
    model.summary(print_fn=lines.append, expand_nested=True)
    rows = [line.split() for line in lines[-1].splitlines()]
    assert ["encoder", "0,", "1", "CPU:0,", "CPU:1"] in rows
    dense, top = (layer.name for layer in model.encoder.layers)
    assert ["└", dense, "0", "CPU:0"] in rows
    assert ["└", top, "1", "CPU:1"] in rows


def test_after_a_call_of_its_own_the_plan_is_that_of_the_model(smp_init):
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    places = [weight.value.device for weight in model.weights]
    model.predict(data(), verbose=0)
    assert isinstance(model.plan, smp.Plan)
    assert [weight.value.device for weight in model.weights] == places


def test_parts_stay_what_they_are(smp_init):
    smp_init(BY_TWO)
    model = fitted(containers.Contrastive)
    parts = [is_part(each) for each in (model.encoder, model.head, model.flat)]
    assert parts == [True, True, False]
    assert isinstance(model.encoder, keras.Sequential)
    assert isinstance(model.head, keras.layers.Dense)
    assert model.encoder.__class__ is keras.Sequential
    assert model.head.__class__ is keras.layers.Dense
    told = keras.saving.serialize_keras_object(model.head)
    assert (told["module"], told["class_name"]) == ("keras.layers", "Dense")
    for made in (
        keras.models.clone_model(model.encoder),
        copy.deepcopy(model.encoder),
        model.encoder.__class__.from_config(model.encoder.get_config()),
    ):
        assert type(made) is keras.Sequential
    face = model.to_keras()
    assert type(face) is containers.Contrastive


def test_outside_of_steps_a_part_is_a_plain_model(smp_init):
    """In one process, where all variables are at hand."""
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    with tf.GradientTape() as tape:
        out = tf.reduce_sum(model.encoder(data()))
    assert all(g is not None for g in tape.gradient(out, model.encoder.trainable_weights))
    face = model.to_keras()
    face.compile(keras.optimizers.SGD(0.1))
    face.fit(data(), batch_size=ROWS, verbose=0)
    inner = keras.Model(model.decoder.inputs, model.decoder.layers[1].output)
    assert inner(data(2)).shape == (ROWS, 8)


def test_run_eagerly_before_and_after(smp_init):
    smp_init(BY_TWO)

    def run(wrap, eagerly):
        keras.utils.set_random_seed(1)
        model, costs = wrap(containers.Contrastive()), []
        for each in eagerly:
            model.compile(keras.optimizers.SGD(0.1), run_eagerly=each)
            costs += model.fit(data(), batch_size=ROWS, verbose=0).history["cost"]
        return {"costs": costs}

    wanted = run(plain, [False] * 4)
    assert_same(run(smp.DistributedModel.from_keras, [True, False, True, False]), wanted)


def test_a_step_reads_no_variable_where_it_no_longer_lies(smp_init):
    """The step that finds the parts is traced once more if it had read them before."""
    smp_init(BY_TWO)
    keras.utils.set_random_seed(6)
    made = containers.Momentum()
    before = [weight.numpy() for weight in made.target.weights]
    model = smp.DistributedModel.from_keras(made)
    model.compile(keras.optimizers.SGD(0.0))
    model.fit(data(), batch_size=ROWS, verbose=0)
    assert homes_of(model.target) == {"CPU:0", "CPU:1"}
    for old, weight, online in zip(before, model.target.weights, model.online.weights, strict=True):
        np.testing.assert_allclose(weight.numpy(), 0.5 * old + 0.5 * online.numpy(), rtol=1e-6)


def test_the_same_for_a_model_that_calls_itself(smp_init):
    smp_init(BY_TWO)

    class Doubles(keras.Sequential):
        def train_step(self, x):
            for weight in self.trainable_weights:
                weight.assign(2.0 * weight)
            return {"cost": tf.reduce_mean(self(x))}

    model = Doubles([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    before = model.get_weights()
    split = smp.DistributedModel.from_keras(model)
    split.compile()
    split.fit(data(), batch_size=ROWS, verbose=0)
    assert homes_of(split) == {"CPU:0", "CPU:1"}
    for old, new in zip(before, split.get_weights(), strict=True):
        np.testing.assert_array_equal(new, 2.0 * old)


class Scores(keras.Model):
    """Gives one number for a batch."""

    def __init__(self):
        super().__init__()
        self.top = keras.layers.Dense(2)

    def call(self, a, b):
        return tf.reduce_mean((self.top(a) - self.top(b)) ** 2)


class Scored(keras.Model):
    def __init__(self):
        super().__init__()
        self.net, self.scores = mlp(6, 6, "net"), Scores()

    def train_step(self, x):
        with tf.GradientTape() as tape:
            cost = self.scores(self.net(x), x)
        gradients = tape.gradient(cost, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"cost": cost}


def test_a_part_that_gives_no_rows_runs_in_one_piece(smp_init, caplog):
    smp_init(BY_TWO)

    def run(wrap):
        keras.utils.set_random_seed(1)
        model = wrap(Scored())
        model.compile(keras.optimizers.SGD(0.1))
        return model.fit(data(), batch_size=ROWS, epochs=3, verbose=0).history

    with caplog.at_level(logging.INFO, "opensmp"):
        assert_same(run(smp.DistributedModel.from_keras), run(plain))
    assert "is called with all rows of a batch at once" in caplog.text


def step_of(model):
    def step(x):
        with tf.GradientTape() as tape:
            a = model.head(model.encoder(model.shift(x)))
            cost = tf.reduce_mean(model.similarity(a, a)) + tf.reduce_mean(a**2)
        return tape.gradient(cost, model.trainable_weights), cost

    return step


def contrastive():
    keras.utils.set_random_seed(1)
    model = containers.Contrastive()
    for layer, width in ((model.head, 8), (model.shift, 6), (model.similarity, 4)):
        layer.build((None, width))
    return model


def test_parts_in_an_smp_step_function(smp_init):
    smp_init(BY_TWO)
    one = contrastive()
    terms = [step_of(one)(half) for half in np.split(data(), 2)]
    model = smp.DistributedModel.from_keras(contrastive())
    gradients, cost = smp.step(step_of(model))(data())
    assert set(model.plan) == {"encoder", model.head.name, model.shift.name, model.similarity.name}
    assert homes_of(model) == {"CPU:0", "CPU:1"}
    np.testing.assert_allclose(cost.reduce_mean(), np.mean([t[1] for t in terms]), rtol=1e-6)
    for found, *wanted in zip(gradients, *(t[0] for t in terms), strict=True):
        np.testing.assert_allclose(found.accumulate(), np.mean(wanted, 0), rtol=1e-5, atol=1e-7)


class NotTracked:
    """Keras does not look into it."""

    def __init__(self, held):
        self.held = held


class Student(keras.Model):
    def __init__(self, teacher):
        super().__init__()
        self.student, self.box = mlp(6, 3, "student"), NotTracked(teacher)

    def train_step(self, x):
        cost = tf.reduce_mean((self.student(x) - self.box.held(x)) ** 2)
        return {"cost": cost}


def test_a_model_that_nobody_holds_stays_whole_and_is_named(smp_init, caplog):
    smp_init(BY_TWO)
    teacher = containers.block(6, 3, "teacher")
    model = smp.DistributedModel.from_keras(Student(teacher))
    model.compile()
    model.fit(data(), batch_size=ROWS, epochs=2, verbose=0)
    assert not is_part(teacher)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (told,) = [text for text in warnings if "teacher" in text]
    assert "`teacher = smp.DistributedModel.from_keras(teacher)`" in told


def test_parts_that_the_user_has_wrapped(smp_init):
    smp_init(BY_TWO)

    class Wrapped(containers.Gan):
        def __init__(self):
            super().__init__()
            self.generator = smp.DistributedModel.from_keras(self.generator)
            self.discriminator = smp.DistributedModel.from_keras(self.discriminator)

    def run(kind):
        keras.utils.set_random_seed(2)
        model = smp.DistributedModel.from_keras(kind())
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1), loss)
        history = model.fit(data(), batch_size=ROWS, epochs=2, verbose=0).history
        assert set(model.plan) == {"generator", "discriminator"}
        assert not is_part(model.generator) or kind is containers.Gan
        return history

    assert_same(run(Wrapped), run(containers.Gan))


def test_losses_of_parts(smp_init):
    """Of their weights, of activations and from `add_loss`, of the model and of the part."""
    smp_init(BY_TWO)
    seen = []

    class Looks(containers.Vae):
        def train_step(self, x):
            out = self.encoder(x)
            seen.append((len(self.losses), len(self.encoder.losses), len(self.decoder.losses)))
            return {"mean": tf.reduce_mean(out), "one": sum(self.losses)}

    keras.utils.set_random_seed(1)
    model = Looks()
    model.encoder(data())
    wanted = sum(map(float, model.losses))
    split = smp.DistributedModel.from_keras(model)
    split.compile()
    history = split.fit(data(), batch_size=ROWS, verbose=0).history
    assert set(seen) == {(2, 2, 0)}
    np.testing.assert_allclose(history["one"][0], wanted, rtol=1e-5)


def test_weights_of_a_model_without_a_call(smp_init, tmp_path):
    smp_init(BY_TWO)
    model = gan()
    with pytest.raises(SavingError, match=r"`model.built = True` before"):
        model.save_weights(tmp_path / "a.weights.h5")
    model.built = True
    model.save_weights(tmp_path / "a.weights.h5")
    before = model.get_weights()
    model.fit(data(), batch_size=ROWS, verbose=0)
    model.load_weights(tmp_path / "a.weights.h5")
    assert_same({"weights": model.get_weights()}, {"weights": before})
    one = containers.Gan()
    one.built = True
    one.load_weights(tmp_path / "a.weights.h5")
    assert_same({"weights": one.get_weights()}, {"weights": before})


def test_a_file_of_the_model_knows_nothing_of_parts(smp_init, tmp_path):
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    model.save(tmp_path / "vae.keras")
    kinds = {"Vae": containers.Vae}
    one = keras.saving.load_model(tmp_path / "vae.keras", custom_objects=kinds)
    assert type(one.encoder) is keras.Sequential
    assert_same({"w": [w.numpy() for w in one.weights]}, {"w": model.get_weights()})
    split = smp.load_model(tmp_path / "vae.keras", custom_objects=kinds)
    assert isinstance(split, smp.DistributedModel)


def test_a_model_is_called_in_a_callback_of_rank_0(smp_init):
    smp_init(BY_TWO)
    other = smp.DistributedModel.from_keras(mlp(6, 2, "other"))
    assert other.predict(data(), verbose=0).shape == (ROWS, 2)
    model = gan()
    assert _index_in(model, model.generator, "predict") > 0
    with pytest.raises(StepError, match=r"predict of model 'other'.*which is being trained"):
        _index_in(model, other, "predict")


def test_a_new_init_splits_the_parts_anew(smp_init):
    smp_init(BY_TWO)
    model = fitted(containers.Vae)
    smp_init({"partitions": 4, "microbatches": 2})
    model.fit(data(), batch_size=ROWS, verbose=0)
    assert model.plan.num_partitions == 4


def test_layers_without_variables_are_left_alone(smp_init):
    smp_init(BY_TWO)
    assert not _private.makes_variables(keras.layers.Flatten())
    assert _private.makes_variables(keras.layers.Dense(1))


def test_a_model_that_is_built_when_a_step_is_traced_has_no_parts(smp_init):
    """Some layers can be built by a call of the model only, on its host."""
    smp_init(BY_TWO)

    class Built(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.Normalization(mean=[1.0] * 6, variance=[4.0] * 6)
            self.top = keras.layers.Dense(2)

        def call(self, x):
            return self.top(self.norm(x))

    model = smp.DistributedModel.from_keras(Built())
    smp.step(lambda x: tf.reduce_mean(model(x)))(data())
    assert not is_part(model.top)
    assert isinstance(model.plan, smp.Plan)
