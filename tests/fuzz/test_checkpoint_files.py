"""Files of checkpoints, damaged at random: no raw error, no wrong value, and saves go on.

`FUZZ_CASES` is the number of damages, `FUZZ_SEED` chooses others. A case that failed is named by
its seed; `FUZZ_CASES=1 FUZZ_SEED=<seed>` repeats it.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import tensorflow as tf

import opensmp as smp

CASES = int(os.environ.get("FUZZ_CASES", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MORE = ["removed", "block", "text"]
SIZE = 300
NEWEST = 12


@pytest.fixture
def directories(smp_init, tmp_path, monkeypatch):
    """Directories with checkpoints 10 to 12: ours, ours in the background, and TensorFlow's."""
    smp_init({"partitions": 1})
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nothing is to outlast a loss of power
    made = {}
    for kind in ("ours", "background", "plain"):
        folder = tmp_path / kind / "run"
        checkpoint = objects()
        if kind == "plain":
            manager = tf.train.CheckpointManager(checkpoint, str(folder), 3)
        else:
            manager = smp.CheckpointManager(checkpoint, folder, 3, background=kind != "ours")
        for number in range(1, NEWEST + 1):
            fill(checkpoint, number)
            manager.save()
        if kind == "background":
            manager.wait()
        made[kind] = folder
    return made


def objects():
    return tf.train.Checkpoint(
        numbers=tf.Variable(tf.zeros([SIZE])),
        texts=tf.Variable(tf.fill([3], "")),
        flags=tf.Variable(tf.fill([5], False)),
        step=tf.Variable(0, dtype=tf.int64),
        large=tf.Variable(tf.zeros([1 << 18])),  # written apart in the background
    )


def fill(checkpoint, number):
    """Values that all tell the number of their checkpoint."""
    checkpoint.numbers.assign(tf.range(SIZE, dtype=tf.float32) + 1000.0 * number)
    checkpoint.texts.assign([f"{number}-{i}" * 20 for i in range(3)])
    checkpoint.flags.assign([bool(number >> i & 1) for i in range(5)])
    checkpoint.step.assign(number)
    checkpoint.large.assign(tf.fill([1 << 18], float(number)))


def values(checkpoint):
    names = ("numbers", "texts", "flags", "step", "large")
    return [getattr(checkpoint, name).numpy().tobytes() for name in names[:1]] + [
        getattr(checkpoint, name).numpy().tolist() for name in names[1:]
    ]


def damage(chance, folder):
    """Damages one file of the newest checkpoint, or the state file; says how."""
    newest = [*sorted(folder.glob(f"ckpt-{NEWEST}.*")), folder / "checkpoint"]
    file = chance.choice([file for file in newest if file.is_file() and file.stat().st_size])
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    how = chance.choice(
        [
            "flip",
            "flip",
            "bits",
            "byte",
            "cut",
            "grow",
            "zeros",
            "swap",
            "directory",
            "empty",
            "removed",
            "block",
            "text",
        ]
    )
    # Half of the damages are near an end, where formats have their headers and footers.
    if chance.random() < 0.5:
        at = chance.choice([at % 64, -1 - at % 64]) % len(content)
    if how == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif how == "bits":
        for _ in range(chance.randrange(2, 50)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == "byte":
        content[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("-"), ord('"')])
    elif how == "cut":
        del content[at:]
    elif how == "grow":
        content += bytes(chance.choices(range(256), k=chance.randrange(1, 200)))
    elif how == "zeros":
        end = min(len(content), at + chance.randrange(1, 5000))
        content[at:end] = bytes(end - at)
    elif how == "block":
        block = content[at : at + chance.randrange(1, 500)]
        to = chance.randrange(len(content))
        content[to : to + len(block)] = block
    elif how == "text":
        text = chance.choice([b"[" * 50_000, b'{"bytes":' * 9000, b"7", b"null", b"a {" * 9000])
        content[:] = text
    elif how == "swap":
        others = [other for other in folder.iterdir() if other.is_file() and other != file]
        other = chance.choice(sorted(others))
        held = other.read_bytes()
        other.write_bytes(bytes(content))
        file.write_bytes(held)
        return f"{how} {file.name} and {other.name}"
    if how in ("directory", "removed"):
        file.unlink()
        if how == "directory":
            file.mkdir()
    else:
        file.write_bytes(b"" if how == "empty" else bytes(content))
    return f"{how} {file.name} at {at}"


def check(seed, made, place):
    """One case; what was wrong with it, None if nothing was."""
    chance = random.Random(seed)
    kind = chance.choice(sorted(made))
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made[kind], folder)
    if kind != "plain" and chance.random() < 0.2:
        (folder / f"ckpt-{NEWEST}.manifest").unlink()
        kind += " without manifest"
    done = [damage(chance, folder)]
    if chance.random() < 0.25 and kind == "ours":
        done.append(damage(chance, folder))
    # Without state file and manifest nothing tells of a checkpoint that has lost its index.
    has_index = (folder / f"ckpt-{NEWEST}.index").is_file() or kind in ("ours", "background")
    if chance.random() < 0.1 and has_index and (folder / "checkpoint").is_file():
        (folder / "checkpoint").unlink()
        done.append("no state file")
    case = f"FUZZ_SEED={seed}: {kind}, {', '.join(done)}"
    checkpoint, expected = objects(), objects()
    fill(checkpoint, -1)
    manager = smp.CheckpointManager(checkpoint, folder, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            path = manager.restore()
        except smp.CheckpointError as error:
            # Two damages may reach all checkpoints, but then nothing is restored.
            fill(expected, -1)
            if values(checkpoint) != values(expected):
                return f"{case}: nothing was to change after {error}"
            if len(done) < 2 and "swap" not in done[0]:
                return f"{case}: good checkpoints were not restored: {error}"
            return None
        except Exception as error:
            return f"{case}: raw {type(error).__name__}: {error}"
        if path is None:
            return f"{case}: nothing was restored"
        number = int(Path(path).name.partition("-")[2])
        if number != NEWEST and not caught:
            return f"{case}: {number} was restored without a warning"
        fill(expected, number)
        if values(checkpoint) != values(expected):
            return f"{case}: wrong values for {number}"
        try:
            fill(checkpoint, 77)
            path = manager.save()
            fill(checkpoint, -1)
            if manager.restore() != path:
                return f"{case}: {path} was saved and not restored"
        except Exception as error:
            return f"{case}: later {type(error).__name__}: {error}"
        fill(expected, 77)
        if values(checkpoint) != values(expected):
            return f"{case}: wrong values of a later save"
    return None


def test_no_damage_of_files_gives_a_raw_error_or_a_wrong_value(directories, tmp_path):
    failed = [check(SEED + number, directories, tmp_path) for number in range(CASES)]
    failed = [text for text in failed if text]
    assert not failed, f"{len(failed)} of {CASES}:\n" + "\n".join(failed[:10])
