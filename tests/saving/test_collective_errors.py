from __future__ import annotations

import errno

import pytest
import tensorflow as tf

from opensmp.errors import CheckpointError, SavingError
from opensmp.saving.collective_errors import (
    DAMAGED,
    OTHER,
    RankResult,
    first_error,
    gathered,
    result_of_error,
)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (tf.errors.DataLossError(None, None, "checksum"), DAMAGED, "DataLossError: checksum"),
        (tf.errors.NotFoundError(None, None, "no file"), DAMAGED, "NotFoundError: no file"),
        (CheckpointError("Ours."), OTHER, "Ours."),
        (SavingError("Ours too."), OTHER, "Ours too."),
        (ValueError("theirs"), OTHER, "ValueError: theirs"),
    ],
)
def test_errors_become_outcomes_that_can_travel(error, kind, text):
    assert result_of_error(error) == RankResult(error=text, kind=kind)


def test_errors_of_the_file_system_say_what_to_do(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    text = result_of_error(full, str(tmp_path)).error
    assert text.startswith("OSError: [Errno 28] No space left on device. ")
    assert f" MiB are free at {tmp_path}; free some" in text
    refused = tf.errors.PermissionDeniedError(None, None, "denied")
    assert "may not write to" in result_of_error(refused, str(tmp_path / "new")).error
    (tmp_path / "file").touch()
    text = result_of_error(
        NotADirectoryError(20, "Not a directory"), str(tmp_path / "file" / "a")
    ).error
    assert f"{tmp_path / 'file'} is a file; expected a directory" in text


def test_one_message_for_all_processes():
    good, bad, worse = RankResult(1), RankResult(error="bad"), RankResult(error="worse")
    assert first_error([good, good]) is None
    assert first_error([bad]) == "bad"
    assert first_error([bad, bad]) == "bad"
    assert first_error([good, bad]) == "rank 1: bad"
    assert first_error([bad, good, worse]) == "rank 0: bad\nrank 2: worse"


def test_a_process_on_its_own_gathers_its_own():
    assert gathered(RankResult(3), range(1), "test") == [RankResult(3)]
