from __future__ import annotations

import zipfile

import pytest

from opensmp.errors import SavingError, StepError
from opensmp.saving.models.inspection.damage import explained


def raised(error):
    with pytest.raises(SavingError) as caught, explained("a.keras", "smp.load_model"):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_files_that_cannot_be_read_are_half_files():
    for error in (zipfile.BadZipFile("no end"), OSError("truncated"), EOFError()):
        assert raised(error).startswith("smp.load_model: a.keras is damaged or half a file: ")


def test_other_errors_keep_their_words():
    text = raised(TypeError("Could not locate class 'Mine'"))
    assert text.startswith("smp.load_model: a.keras cannot be loaded")
    assert "TypeError: Could not locate class 'Mine'" in text


def test_a_text_that_quotes_all_of_a_configuration_is_cut_in_the_middle():
    text = raised(TypeError("begin" + "x" * 100_000 + "end"))
    assert "begin" in text
    assert text.endswith("end")
    assert len(text) < 3000


def test_depth_and_permission_have_messages_of_their_own():
    assert "nested too deeply" in raised(RecursionError())
    assert "may not read a.keras: Permission denied" in raised(
        PermissionError(13, "Permission denied")
    )


def test_errors_of_opensmp_pass_and_so_does_a_request_to_stop():
    for error in (StepError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), explained("a.keras", "smp.load_model"):
            raise error
