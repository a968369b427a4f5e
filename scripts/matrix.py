#!/usr/bin/env python
"""Runs smoke, canaries and parity tests with the oldest and newest TensorFlow, Keras and Python.

    scripts/matrix.sh                      # makes the environments, runs all, writes the table
    scripts/matrix.sh --quick              # the oldest versions' smoke alone; writes nothing
    scripts/matrix.sh --only newest        # one row, and the table
    scripts/matrix.sh --results            # the table alone, of results that are there

"Oldest" is what pyproject.toml allows, "newest" what the package index has. An environment is about
1.7 GB; it is kept in --cache and used again as long as nothing that it was made from has changed.
A Python that is not installed is left out. Results are kept in docs/versions.jsonl, a line for
each row, so that a run that was stopped goes on with --only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import made_part

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TENSORFLOW = "tensorflow-cpu"
SHOWN = {
    "python": "Python",
    TENSORFLOW: "TensorFlow",
    "keras": "Keras",
    "numpy": "NumPy",
    "h5py": "h5py",
    "matplotlib": "Matplotlib",
    "rich": "Rich",
    "typer": "Typer",
}
OLDEST = "oldest"
MINUTES = {"smoke": 15, "canaries": 30, "parity": 120}

Version = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """An environment.

    Attributes:
        name: What is old and new in it.
        python: Such as `"3.10"`.
        pins: Distribution to the version that it must have; the others are the newest that go
            with these.
    """

    name: str
    python: str
    pins: Mapping[str, str]


def main() -> int:
    """Runs and writes; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smoke of the oldest alone")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows")
    parser.add_argument("--without-parity", action="store_true", help="the table keeps what it had")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    parser.add_argument("--results", action="store_true", help="run nothing")
    parser.add_argument("--cache", type=Path, default=ROOT / ".matrix", help="of environments")
    parser.add_argument("--record", type=Path, default=ROOT / "docs" / "versions.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "versions.md")
    arguments = parser.parse_args()
    if arguments.results:
        made_part.write(arguments.page, "matrix", table(load(arguments.record)))
        return 0
    rows = planned(Index(), arguments.quick)
    wanted = [OLDEST] if arguments.quick else arguments.only or [row.name for row in rows]
    unknown = set(wanted) - {row.name for row in rows}
    if unknown:
        names = ", ".join(row.name for row in rows)
        parser.error(f"there are no rows {sorted(unknown)}; there are: {names}")
    checks = ["smoke"] if arguments.quick else ["smoke", "canaries"]
    if not arguments.quick and not arguments.without_parity:
        checks.append("parity")

    def keep(result: dict[str, Any]) -> None:
        if not arguments.quick:
            record(arguments.record, result, [each.name for each in rows])
            made_part.write(arguments.page, "matrix", table(load(arguments.record)))

    good = True
    for row in rows:
        if row.name in wanted:
            result = run(row, arguments.cache, checks, arguments.fresh, keep)
            good &= all(result[check]["good"] for check in checks)
    return int(not good)


class Index:
    """What the package index has for the Pythons that are installed here."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[str]] = {}
        self.interpreters = interpreters()

    def versions(self, python: str, name: str) -> list[str]:
        """All releases of a distribution for a Python, the oldest first."""
        if (python, name) not in self._known:
            command = [self.interpreters[python], "-m", "pip", "index", "versions", name]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            line = re.search(r"Available versions: (.*)", found.stdout)
            if line is None:
                raise SystemExit(f"matrix: {' '.join(command)} failed: {found.stderr.strip()}")
            finals = [v for v in line[1].split(", ") if re.fullmatch(r"[\d.]+", v)]
            self._known[python, name] = sorted(finals, key=number)
        return self._known[python, name]

    def needed(self, python: str, tensorflow: str, name: str) -> str:
        """The oldest version of a distribution that a TensorFlow accepts."""
        command = [self.interpreters[python], "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--no-deps", "--report", "-"]
        command += [f"{TENSORFLOW}=={tensorflow}"]
        report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        wanted = json.loads(report)["install"][0]["metadata"]["requires_dist"]
        found = [re.fullmatch(rf"{name}\b.*?>=\s*([\d.]+).*", each) for each in wanted]
        return next((each[1] for each in found if each), "0")


def interpreters() -> dict[str, str]:
    """Version to path of the Pythons that pyproject.toml names and that are installed."""
    wanted = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {}
    for version in sorted(set(wanted), key=number):
        candidates = [shutil.which(f"python{version}"), sys.executable]
        candidates += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))
        for candidate in filter(None, candidates):
            ask = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            answer = subprocess.run(ask, capture_output=True, text=True, check=False)
            if answer.stdout.strip() == version:
                found[version] = candidate
                break
    return found


def number(version: str) -> Version:
    """A version for comparison, such as (2, 19, 0)."""
    return tuple(int(part) for part in version.split(".") if part)


def project() -> dict[str, Any]:
    """What pyproject.toml says of the project."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def floors() -> dict[str, str]:
    """Distribution to the oldest version that pyproject.toml allows."""
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["cpu"]]
    return dict(each.split(">=") for each in wanted)


def planned(index: Any, quick: bool = False) -> list[Row]:
    """The rows: the oldest and the newest of everything, and pairs between.

    Args:
        index: An `Index`, or what has its `interpreters`, `versions` and `needed`.
        quick: Whether only the first row is wanted, which asks the package index less.
    """
    pythons = sorted(index.interpreters, key=number)
    if not pythons:
        raise SystemExit("matrix: none of the Pythons that pyproject.toml names is installed.")
    least = floors()

    def from_floor(python: str, name: str, floor: str = "0") -> list[str]:
        low = max(number(least[name]), number(floor))
        return [v for v in index.versions(python, name) if number(v) >= low]

    def middle(versions: Sequence[str]) -> str:
        """The last release of the minor version in the middle."""
        minors = sorted({number(v)[:2] for v in versions})
        chosen = minors[len(minors) // 2]
        return [v for v in versions if number(v)[:2] == chosen][-1]

    def row(name: str, python: str, tensorflow: str, keras: str) -> Row:
        return Row(name, python, {TENSORFLOW: tensorflow, "keras": keras})

    first = pythons[0]
    rows = [Row(OLDEST, first, {name: from_floor(first, name)[0] for name in least})]
    if quick:
        return rows
    second, third, last = pythons[min(1, len(pythons) - 1)], pythons[-2:][0], pythons[-1]
    tensorflows, kerases = from_floor(second, TENSORFLOW), from_floor(second, "keras")
    rows.append(row("old-tensorflow", second, tensorflows[0], kerases[-1]))
    tensorflow = middle(from_floor(third, TENSORFLOW))
    needed = index.needed(third, tensorflow, "keras")
    keras = middle(from_floor(third, "keras", needed))
    rows.append(row("middle", third, tensorflow, keras))
    needed = index.needed(second, tensorflows[-1], "keras")
    keras = from_floor(second, "keras", needed)[0]
    rows.append(row("old-keras", second, tensorflows[-1], keras))
    newest = {name: index.versions(last, name)[-1] for name in (TENSORFLOW, "keras")}
    rows.append(Row("newest", last, newest))
    return rows


def run(
    row: Row,
    cache: Path,
    checks: Sequence[str],
    fresh: bool,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Makes the environment of a row if need be, and runs checks in it.

    Args:
        row: The row.
        cache: Where environments are.
        checks: Names of checks.
        fresh: Whether the environment is made anew.
        keep: Gets what is there so far after each check, which may take an hour.

    Returns:
        Name, date and versions of the row, and by check whether it was good, and a text.
    """
    python = environment(row, cache, fresh)
    versions = versions_in(python)
    said = ", ".join(f"{SHOWN[name]} {version}" for name, version in versions.items())
    print(f"matrix: {row.name}: {said}", flush=True)
    result: dict[str, Any] = {
        "name": row.name,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }
    for check in checks:
        started = time.monotonic()
        good, text = smoke(python) if check == "smoke" else tests(python, check)
        result[check] = {"good": good, "text": text}
        seconds = time.monotonic() - started
        print(f"matrix: {row.name}: {check}: {text}, {seconds:.0f} s", flush=True)
        keep(result)
    return result


def environment(row: Row, cache: Path, fresh: bool) -> Path:
    """The Python of a row's environment, which is made if it is not there as it should be."""
    folder = (cache / row.name).resolve()
    python, stamp = folder / "bin" / "python", folder / "made-from.json"
    extras = project()["optional-dependencies"]
    needed = [*project()["dependencies"], *extras["cpu"], *extras["test"]]
    wanted = json.dumps({**asdict(row), "needed": needed, "root": str(ROOT)})
    if not fresh and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"matrix: {row.name}: making {folder} (a minute or two, once)", flush=True)
    interpreter = interpreters()[row.python]
    # --clear: an interrupted run may have left half of one.
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    pins = [f"{name}=={version}" for name, version in row.pins.items()]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-compile"]  # of the 20,000 files few are ever imported
    done = subprocess.run(
        [*install, "-e", ".[cpu,test]", *pins], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"matrix: {row.name}: pip failed:\n{done.stderr[-4000:]}")
    stamp.write_text(wanted)
    return python


def versions_in(python: Path) -> dict[str, str]:
    """What an environment has."""
    ask = "import importlib.metadata as m, platform, sys; print(platform.python_version(), " + (
        "*map(m.version, sys.argv[1:]))"
    )
    names = [name for name in SHOWN if name != "python"]
    command = [python, "-c", ask, *names]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(SHOWN, found, strict=True))


def smoke(python: Path) -> tuple[bool, str]:
    """Runs scripts/smoke.py in one process, then in two ranks."""
    script = ROOT / "scripts" / "smoke.py"
    with tempfile.TemporaryDirectory() as folder:
        for ranks in ([], ["-m", "opensmp", "run", "-n", "2"]):
            done = bounded([python, *ranks, script, folder], "smoke")
            if done is None or done.returncode:
                text = "it did not end" if done is None else done.stdout[-4000:]
                print(text, file=sys.stderr)
                return False, f"failed in {2 if ranks else 1} process(es)"
    return True, "passed"


def tests(python: Path, check: str) -> tuple[bool, str]:
    """Runs the canaries, or today's part of the parity tests."""
    folder = {"canaries": "tests/private", "parity": "tests/parity"}[check]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", folder]
        command += ["-m", "not slow"]
        done = bounded([*command, f"--junitxml={report}"], check)
        if done is None or not report.exists():
            print("it did not end" if done is None else done.stdout[-4000:], file=sys.stderr)
            return False, "did not end" if done is None else "did not run"
        if done.returncode:
            print(done.stdout[-8000:], file=sys.stderr)
        return counted(ElementTree.parse(report).getroot(), done.returncode)


def counted(report: Any, status: int) -> tuple[bool, str]:
    """What a report of pytest in the form of JUnit says, and whether it is good."""
    suites = list(report.iter("testsuite"))
    count = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    parts = [f"{passed} passed"]
    parts += [f"{count['skipped']} skipped"] if count["skipped"] else []
    parts += [f"{failed} failed"] if failed else []
    parts += ["stopped early"] if status and not failed else []
    return status == 0 and passed > 0 and not failed, ", ".join(parts)


def bounded(command: Sequence[Any], check: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a command without any configuration in its environment; None if it takes too long."""
    dropped = ("OPENSMP_", "SM_HP_", "KERAS_", "PYTHONPATH", "TF_USE_LEGACY_KERAS")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=MINUTES[check] * 60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its ranks too
            process.communicate()
            return None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def load(path: Path) -> list[dict[str, Any]]:
    """The results that are kept."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def record(path: Path, result: dict[str, Any], order: Sequence[str]) -> None:
    """Puts a result in the place of the earlier one of its row.

    What was not run this time stays if the versions are the same.
    """
    kept = {each["name"]: each for each in load(path)}
    earlier = kept.get(result["name"], {})
    if earlier.get("versions") == result["versions"]:
        result = {**earlier, **result}
    kept[result["name"]] = result
    lines = [json.dumps(kept[name]) for name in order if name in kept]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    if not results:
        return "There are no results yet."
    checks = ("smoke", "canaries", "parity")
    lines = [
        f"| {' | '.join(SHOWN.values())} | {' | '.join(checks)} | run |",
        f"|{' --- |' * (len(SHOWN) + len(checks) + 1)}",
    ]
    for result in results:
        versions = [result["versions"][name] for name in SHOWN]
        cells = [cell(result.get(check)) for check in checks]
        lines.append(f"| {' | '.join([*versions, *cells, result['date']])} |")
    return "\n".join(lines)


def cell(found: Mapping[str, Any] | None) -> str:
    """What a check gave; bold if it failed."""
    if found is None:
        return "not run"
    return str(found["text"]) if found["good"] else f"**{found['text']}**"


if __name__ == "__main__":
    sys.exit(main())
