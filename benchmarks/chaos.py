"""Training that is killed at random moments ends at the same bits: `python benchmarks/chaos.py`.

Ranks train a small model to its end, with `smp.CheckpointManager` in a loop of their own or with
`fit` and `BackupAndRestore`. In each run one rank is killed with SIGKILL at a random moment of a
phase; then all ranks are started again, as `opensmp run --max-restarts` does, and so on. At last a
run is left alone, and a digest of the final weights is compared with the one of a program that
was never killed. No checkpoint that was reported as saved may be gone, and the other ranks must
end by themselves.

The second table breaks one thing at a time: the run must end, or go on where it can, and a new
start must come to the same bits.

    python benchmarks/chaos.py                       # 200 kills, then the faults
    python benchmarks/chaos.py --kills 1000 --seed 3 --no-faults
    python benchmarks/chaos.py --quick               # 10 kills with two ranks, and three faults
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import chaos_ranks
from chaos_runs import Kill, Kind, run

PHASES = ("start", "trace", "step", "save", "restore", "shutdown")


# ------------------------------------------------------------------------------------- kills


@contextlib.contextmanager
def folder_of_a_program() -> Iterator[Path]:
    """A folder with an empty `work` in it."""
    # A TemporaryDirectory would be removed by the forked processes, too, when they end.
    folder = Path(tempfile.mkdtemp(prefix="opensmp-chaos-"))
    try:
        (folder / "work").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def undisturbed(kind: Kind) -> tuple[str, dict[str, list[float]]]:
    """Digest of the program that is left alone, and how long its phases take."""
    with folder_of_a_program() as folder:
        outcome = run(kind, folder)
        if any(outcome.codes):
            sys.exit(f"{kind}: the run that was left alone failed\n{outcome.output}")
        return (folder / "digest").read_text(), outcome.spans


def draw(kind: Kind, phase: str, spans: dict[str, list[float]], moments: random.Random) -> Kill:
    """A random moment of a phase, in a random rank."""
    times = spans.get(phase) or [0.2]
    occurrence = moments.randint(1, min(len(times), 3))
    longest = times[occurrence - 1] if occurrence <= len(times) else times[-1]
    return Kill(moments.randrange(kind.ranks), phase, occurrence, moments.uniform(0.0, longest))


def chain(
    kind: Kind, phases: list[str], digest: str, spans: dict[str, list[float]], seed: int
) -> tuple[Counter[str], list[str]]:
    """One program that is killed in each of these phases, and then left alone.

    Returns:
        How many kills came in time in each phase, and what was wrong.
    """
    moments = random.Random(seed)
    hits: Counter[str] = Counter()
    faults: list[str] = []
    saved = 0
    with folder_of_a_program() as folder:
        for phase in [*phases, ""]:
            kill = draw(kind, phase, spans, moments) if phase else None
            outcome = run(kind, folder, kill)
            if outcome.restored is not None and outcome.restored < saved:
                faults.append(f"{saved} steps were saved, {outcome.restored} were restored")
            saved = max(saved, outcome.saved, outcome.restored or 0)
            hits[phase] += outcome.hit
            if outcome.hung:
                faults.append(f"ranks {outcome.hung} did not end after {kill}\n{outcome.output}")
            if not outcome.hit and any(outcome.codes):
                faults.append(f"a run that was not killed failed\n{outcome.output}")
        found = folder / "digest"
        if not found.exists() or found.read_text() != digest:
            faults.append(f"other final weights after {phases}, seed {seed}")
    return hits, faults


def shares(number: int, kinds: list[Kind]) -> list[int]:
    """How many of the kills each kind gets: fewer where there are more ranks to start."""
    weights = [1 / kind.ranks for kind in kinds]
    bounds = [round(number * sum(weights[:i]) / sum(weights)) for i in range(len(kinds) + 1)]
    return [end - begin for begin, end in itertools.pairwise(bounds)]


def kills(kinds: list[Kind], number: int, seed: int, per_chain: int) -> bool:
    """The table of kills; whether all of them were survived."""
    print(f"{number} kills at random moments, {per_chain} in one program, seed {seed}\n")
    print(f"{'':20}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'same bits':>14}")
    good = True
    for kind, share in zip(kinds, shares(number, kinds), strict=True):
        digest, spans = undisturbed(kind)
        hits: Counter[str] = Counter()
        survived, attempt, faults = 0, 0, []
        while sum(hits.values()) < share and attempt < 4 * share:
            left = min(per_chain, share - sum(hits.values()))
            # A run that is killed while it starts has nothing to restore: phases take turns.
            phases = [PHASES[(attempt * per_chain + i) % len(PHASES)] for i in range(left)]
            one, wrong = chain(kind, phases, digest, spans, seed * 10_000 + attempt)
            one.pop("", None)
            hits += one
            survived += 0 if wrong else sum(one.values())
            faults += wrong
            attempt += 1
        total = sum(hits.values())
        row = "".join(f"{hits[phase]:>10}" for phase in PHASES)
        print(f"{kind!s:20}{row}{f'{survived} of {total}':>14}", flush=True)
        for fault in faults[:3]:
            print(fault)
        good = good and survived == total == share
    return good


# ------------------------------------------------------------------------------------ faults


@dataclass(frozen=True)
class Fault:
    """A thing that is broken once.

    Attributes:
        name: What.
        way: What is trained.
        says: Part of what a rank prints; "" where the run is to go on to its end.
        needs_mounts: Whether the system must let this program mount file systems.
    """

    name: str
    way: str
    says: str
    needs_mounts: bool = False


FAULTS = [
    Fault("SIGSTOP", "manager", "it is frozen"),
    Fault("exception", "manager", "ValueError: a fault of the program"),
    Fault("exception in the step", "manager", "a fault in the step"),
    Fault("exception in a callback", "fit", "ValueError: a fault in a callback"),
    Fault("exception in the dataset", "fit", "a fault in the dataset"),
    Fault("exit with code 3", "manager", "rank 1"),
    Fault("exit at once with code 0", "manager", "rank 1 failed"),
    Fault("out of memory", "manager", "rank 1 failed"),
    Fault("full disk", "manager", "No space left on device", needs_mounts=True),
    Fault("read-only", "manager", "Read-only file system", needs_mounts=True),
    Fault("/dev/shm is full", "manager", "", needs_mounts=True),
    Fault("port taken", "manager", "in use"),
    Fault("clock a day forward", "manager", ""),
    Fault("clock a day back", "fit", ""),
    Fault("directory removed", "manager", ""),
]


def break_once(fault: Fault, digest: str) -> list[str]:
    """What was wrong with one fault and the start after it."""
    kind, wrong = Kind(fault.way, 2), []
    with folder_of_a_program() as folder:
        work, shared = folder / "work", Path("/dev/shm")
        try:
            if fault.name in ("full disk", "read-only"):
                chaos_ranks.mount(work, "size=24k" if fault.name == "full disk" else "size=64m")
            if fault.name == "read-only":  # after it has saved, as nothing may be open then
                run(kind, folder, fault="exit with code 3", victim=1)
                chaos_ranks.mount(work, "", again=True, read_only=True)
            if fault.name == "/dev/shm is full":
                chaos_ranks.mount(shared, "size=4k")
                with contextlib.suppress(OSError):
                    (shared / "full").write_bytes(bytes(1 << 20))
            outcome = run(
                kind, folder, fault=fault.name, victim=1, port_taken=fault.name == "port taken"
            )
            if outcome.hung:
                wrong.append(f"ranks {outcome.hung} did not end by themselves")
            if fault.says:
                if fault.says not in outcome.output:
                    wrong.append(f"did not say {fault.says!r}\n{outcome.output}")
                if (folder / "digest").exists():
                    wrong.append("the run came to its end")
                if fault.name in ("full disk", "read-only"):
                    chaos_ranks.mount(work, "size=64m", again=True)
                outcome = run(kind, folder)
            if any(outcome.codes):
                wrong.append(f"exit codes {outcome.codes}\n{outcome.output}")
            elif (folder / "digest").read_text() != digest:
                wrong.append("other final weights")
        finally:
            for place in (work, shared):
                if fault.needs_mounts:
                    chaos_ranks.unmount(place)
            if fault.name == "directory removed":
                shutil.rmtree(work, ignore_errors=True)
    return wrong


def faults(listed: list[Fault]) -> bool:
    """The table of faults; whether each of them was as expected."""
    print(f"\n{'fault of one rank':28}{'way':10}{'ends, and goes on to the same bits'}")
    mounts = chaos_ranks.own_mounts()
    digests = {way: undisturbed(Kind(way, 2))[0] for way in {fault.way for fault in listed}}
    good = True
    for fault in listed:
        if fault.needs_mounts and not mounts:
            print(f"{fault.name:28}{fault.way:10}not tried: needs the right to mount")
            continue
        wrong = break_once(fault, digests[fault.way])
        print(f"{fault.name:28}{fault.way:10}{'; '.join(wrong) or 'yes'}", flush=True)
        good = good and not wrong
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-chain", type=int, default=6, help="kills in one program")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--no-faults", action="store_true", help="only the kills")
    parser.add_argument("--only", nargs="+", choices=[f.name for f in FAULTS], metavar="FAULT")
    parser.add_argument("--quick", action="store_true", help="ten kills, two ranks, three faults")
    arguments = parser.parse_args()
    number, ranks, listed = arguments.kills, arguments.ranks, FAULTS
    if arguments.quick:
        number, ranks, listed = 10, [2], [FAULTS[1], FAULTS[3], FAULTS[14]]
    if arguments.only:
        number, listed = 0, [fault for fault in FAULTS if fault.name in arguments.only]
    kinds = [Kind(way, n) for n in ranks for way in ("manager", "fit")]
    good = number == 0 or kills(kinds, number, arguments.seed, arguments.per_chain)
    if not arguments.no_faults:
        good = faults(listed) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
