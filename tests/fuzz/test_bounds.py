"""The bounds themselves: a check that cannot fail would find nothing."""

from __future__ import annotations

import contextlib
import time

import pytest
from fuzz import bounds
from fuzz.bounds import Fault, taken

from opensmp.errors import ConfigError


def refuse(text: str) -> None:
    raise ConfigError(text)


def test_a_value_and_a_refusal_are_results():
    assert taken(lambda: 7) == (7, None)
    assert str(taken(lambda: refuse("wrong")).error) == "wrong"


@pytest.mark.parametrize("error", [ValueError, RecursionError, MemoryError, KeyError])
def test_a_raw_error_is_a_fault(error):
    def fail() -> None:
        raise error("x")

    with pytest.raises(Fault, match=f"raw error, {error.__name__}"):
        taken(fail)


@pytest.mark.parametrize("text", ["", " \n", "x" * 100_000])
def test_a_message_that_says_nothing_or_too_much_is_a_fault(text):
    with pytest.raises(Fault, match="refused"):
        taken(lambda: refuse(text))


def test_processor_time_is_bounded_and_waiting_is_not_counted():
    def compute() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    assert taken(lambda: time.sleep(0.3), most_seconds=0.2).error is None
    with pytest.raises(Fault, match="of processor time"):
        taken(compute, most_seconds=0.2)


def test_a_first_time_that_is_slow_is_forgiven():
    pending = [0.3]

    def compute() -> None:
        end = time.process_time() + (pending.pop() if pending else 0)
        while time.process_time() < end:
            pass

    assert taken(compute, most_seconds=0.2).error is None


def test_memory_is_bounded_even_if_it_is_given_back():
    assert taken(lambda: len(bytes(20 << 20))).value == 20 << 20
    for _ in range(2):  # also when the process has held as much before
        with pytest.raises(Fault, match="MiB of memory"):
            taken(lambda: len(b"x" * (300 << 20)))


def test_a_case_that_stands_still_is_ended(monkeypatch):
    monkeypatch.setattr(bounds, "_STANDSTILL_SECONDS", 0.2)

    def wait() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.05)

    with pytest.raises(Fault, match="did not end"):
        taken(wait)


def test_a_case_that_computes_for_ever_is_ended():
    def compute() -> None:
        while True:
            sum(range(1000))

    with pytest.raises(Fault, match="did not end"):
        taken(compute, most_seconds=0.05)


def test_the_number_of_cases_is_chosen_from_outside(monkeypatch):
    monkeypatch.delenv("FUZZ_CASES", raising=False)
    few = bounds.cases()
    assert few.derandomize
    assert few.max_examples < 1000
    monkeypatch.setenv("FUZZ_CASES", "20000")
    many = bounds.cases(one_in=4)
    assert not many.derandomize
    assert many.max_examples == 5000
