from __future__ import annotations

import json

import pytest
import tensorflow as tf

from opensmp.distributed.watchdog.rank_error import RankError, from_rank, is_from_elsewhere
from opensmp.errors import StepError


def travelled(error):
    return RankError(**json.loads(json.dumps(RankError.of(3, error)._asdict()))).as_exception()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no rows"),
        KeyError("no rows"),
        StepError("no rows"),
        tf.errors.InvalidArgumentError(None, None, "no rows"),
        tf.errors.ResourceExhaustedError(None, None, "no rows"),
    ],
)
def test_an_error_keeps_its_class_and_names_the_rank(error):
    made = travelled(error)
    assert type(made) is type(error)
    assert "no rows" in str(made)
    assert "rank 3" in str(made)


class Odd(OSError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def test_an_error_that_cannot_be_made_of_a_message_becomes_one_of_a_class_above_it():
    assert type(travelled(Odd("a", "b"))) is OSError


def test_an_error_of_a_class_that_is_not_known_here_becomes_a_step_error():
    made = RankError(1, ["no.such.module:Strange"], "text").as_exception()
    assert type(made) is StepError
    assert "Strange: text" in str(made)


def test_an_error_without_a_message_names_its_class():
    assert str(RankError.of(0, ValueError())) == "ValueError"


def test_what_is_raised_because_of_another_rank_is_marked():
    assert is_from_elsewhere(from_rank(ValueError(), 1))
    assert not is_from_elsewhere(ValueError())
