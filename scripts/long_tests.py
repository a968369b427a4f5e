"""Writes tests/long.txt, the tests that take long, from what a run has said of their durations.

    bash scripts/test.sh -m "not slow" --durations=0 --durations-min=0.3 | tee durations.txt
    python scripts/long_tests.py durations.txt

A test is long if one of its cases takes `--seconds` or more, set-up and clean-up included. Long
tests are left out of the default run, for the change at hand; `-m "not slow"` runs them too.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
LINE = re.compile(r"(\d+\.\d+)s (?:call|setup|teardown) +(\S[^@]*?)(?:@\S.*)?\s*")


def seconds_of_cases(text: str) -> Counter[str]:
    """Seconds of each case of a test, from the lines that `--durations` prints."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match:
            found[match[2]] += float(match[1])
    return found


def long_tests(cases: Counter[str], seconds: float) -> list[str]:
    """Tests of which one case takes so many seconds or more, without parameters."""
    worst: defaultdict[str, float] = defaultdict(float)
    for case, taken in cases.items():
        test = case.partition("[")[0]
        worst[test] = max(worst[test], taken)
    return sorted(test for test, taken in worst.items() if taken >= seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("durations", type=Path, help="what a run with --durations=0 has printed")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a long test takes")
    arguments = parser.parse_args()
    cases = seconds_of_cases(arguments.durations.read_text(encoding="utf-8"))
    tests = long_tests(cases, arguments.seconds)
    (TESTS / "long.txt").write_text("".join(f"{test}\n" for test in tests), encoding="utf-8")
    chosen = set(tests)
    taken = sum(t for case, t in cases.items() if case.partition("[")[0] in chosen)
    print(f"{len(tests)} tests take {taken:.0f} of {sum(cases.values()):.0f} s")


if __name__ == "__main__":
    main()
