"""The directory of checkpoints: copied, moved, shared, described by a file that says anything."""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from processes import environ_of_tests

import opensmp as smp
from opensmp.saving.checkpoint.directory import state_file as state_module


@pytest.fixture(autouse=True)
def one_process(smp_init):
    smp_init({"partitions": 1})


class Run:
    """A variable and a manager of it."""

    def __init__(self, directory, max_to_keep=3, **kwargs):
        self.value = tf.Variable(tf.zeros([100]))
        self.manager = smp.CheckpointManager(
            tf.train.Checkpoint(value=self.value), directory, max_to_keep, **kwargs
        )

    def save(self, *numbers):
        for number in numbers:
            self.value.assign(tf.fill([100], float(number)))
            path = self.manager.save()
        return path

    def restored(self, *args):
        self.value.assign(tf.fill([100], -1.0))
        path = self.manager.restore(*args)
        (found,) = set(self.value.numpy())
        return path, float(found)


def content(directory):
    """Names and bytes of all files below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file()
    }


def numbers(run):
    return [int(path.rpartition("-")[2]) for path in run.manager.checkpoints]


# ----------------------------------------------------------------------------- copied and moved


@pytest.mark.parametrize("how", ["copied", "moved", "linked"])
def test_a_directory_elsewhere_goes_on_there_and_leaves_the_original_alone(tmp_path, how):
    first = Run(tmp_path / "a")
    first.save(1, 2, 3)
    first.manager._shelf._lock.release()
    if how == "copied":
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    elif how == "moved":
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
    else:
        (tmp_path / "b").symlink_to(tmp_path / "a")
    before = content(tmp_path / "a")
    here = str(tmp_path / "b")
    assert tf.train.latest_checkpoint(here) == f"{here}/ckpt-3"
    run = Run(here)
    assert run.manager.checkpoints == [f"{here}/ckpt-{number}" for number in (1, 2, 3)]
    assert run.restored() == (f"{here}/ckpt-3", 3.0)
    assert run.save(4) == f"{here}/ckpt-4"
    assert tf.train.latest_checkpoint(here) == f"{here}/ckpt-4"
    assert numbers(run) == [2, 3, 4]
    if how != "linked":
        assert content(tmp_path / "a") == before


def test_a_state_file_with_absolute_paths_of_another_place_is_understood(tmp_path):
    Run(tmp_path / "a").save(1, 2, 3)
    tf.compat.v1.train.update_checkpoint_state(
        str(tmp_path / "a"),
        str(tmp_path / "a" / "ckpt-3"),
        [str(tmp_path / "a" / f"ckpt-{number}") for number in (1, 2, 3)],
        all_model_checkpoint_timestamps=[1.0, 2.0, 3.0],
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = content(tmp_path / "a")
    run = Run(tmp_path / "b", max_to_keep=1)
    assert run.restored() == (str(tmp_path / "b" / "ckpt-3"), 3.0)
    run.save(4)
    assert numbers(run) == [4]
    assert content(tmp_path / "a") == before
    assert tf.train.latest_checkpoint(tmp_path / "b") == str(tmp_path / "b" / "ckpt-4")


HOSTILE = [
    "/outside/ckpt-1",
    "../outside/ckpt-1",
    "../outside/other-1",
    "outside/../../outside/ckpt-1",
    "..",
    ".",
    "",
    "/",
    "ckpt-1/../../outside/ckpt-1",
    "ckpt-best-1",
    "ckpt-007",
    "ckpt-*",
    "sub/ckpt-1",
    "link-1",
    "gs://bucket/ckpt-1",
    "ckpt-1.index",
    "\0ckpt-1",
    "ckpt-" + "9" * 5000,
]


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: repr(path)[:30])
def test_no_path_of_a_state_file_makes_anything_else_be_touched(tmp_path, path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    Run(outside).save(7)
    Run(outside, checkpoint_name="other").save(8)
    for name, value in (("ckpt-best", 9), ("sub/ckpt", 10)):
        folder, _, name = (inside / name).as_posix().rpartition("/")
        Run(folder, checkpoint_name=name).save(value)
    for file in outside.glob("other-1*"):
        (inside / file.name.replace("other", "link")).symlink_to(file)
    for name in ("ckpt-007.index", "ckpt-007.data-00000-of-00001", "ckpt-1.index.bak"):
        (inside / name).write_text("mine")
    kept = {**content(outside), **content(inside)}
    del kept["checkpoint"]
    path = path.replace("/outside", str(outside)) if path.startswith("/out") else path
    state = tf.compat.v1.train.generate_checkpoint_state_proto(
        "/", path, [path], all_model_checkpoint_timestamps=[1.0]
    )
    (inside / "checkpoint").write_text(str(state))
    run = Run(inside, max_to_keep=1)
    assert run.manager.checkpoints == []
    assert run.manager.latest_checkpoint is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run.manager.restore() is None
        run.save(1, 2, 3)
    assert numbers(run) == [3]
    assert run.restored() == (str(inside / "ckpt-3"), 3.0)
    after = {**content(outside), **content(inside)}
    assert {name: after.get(name) for name in kept} == kept


def test_links_to_elsewhere_are_neither_listed_nor_restored_nor_written_through(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    Run(outside).save(1, 2)
    inside.mkdir()
    for name in os.listdir(outside):
        if name.startswith("ckpt-") or name == "checkpoint":
            (inside / name).symlink_to(outside / name)
    before = content(outside)
    run = Run(inside, max_to_keep=1)
    assert run.manager.checkpoints == []
    with pytest.raises(smp.CheckpointError, match=r"links to a place outside of .*their own path"):
        run.manager.restore()
    run.save(5)
    assert run.restored() == (str(inside / "ckpt-3"), 5.0)
    (inside / "ckpt-3.index").unlink()
    with pytest.raises(smp.CheckpointError, match=r"(?s)ckpt-3: there is no file.*ckpt-2: its"):
        run.manager.restore()
    assert run.restored(outside / "ckpt-2") == (str(outside / "ckpt-2"), 2.0)
    assert content(outside) == before
    assert not (inside / "checkpoint").is_symlink()


def test_links_within_the_directory_are_files_as_others(tmp_path):
    run = Run(tmp_path)
    run.save(1)
    (tmp_path / "data").mkdir()
    for file in list(tmp_path.glob("ckpt-1.*")):
        file.rename(tmp_path / "data" / file.name)
        file.symlink_to(tmp_path / "data" / file.name)
    assert run.restored() == (str(tmp_path / "ckpt-1"), 1.0)
    run.manager._most = 1
    run.save(2)
    assert numbers(run) == [2]
    assert len(list((tmp_path / "data").iterdir())) == 3  # only the links went


@pytest.mark.parametrize("what", ["staging", "spare", "lock"])
def test_hidden_names_that_are_links_lead_nowhere(tmp_path, what):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    Run(outside).save(1)
    inside.mkdir()
    big = outside / "big"
    big.write_bytes(bytes(1 << 21))
    before = content(outside)
    name, target = {
        "staging": (".ckpt.unfinished", outside),
        "spare": (".ckpt.spare-0", big),
        "lock": (".ckpt.lock", big),
    }[what]
    (inside / name).symlink_to(target)
    value = tf.Variable(tf.ones([1 << 19]))
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(v=value), inside, max_to_keep=1, background=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            manager.save()
            manager.wait()
    assert [str(w.message) for w in caught if "locked" in str(w.message)] or what != "lock"
    assert content(outside) == before
    assert manager.restore() == str(inside / "ckpt-3")


# --------------------------------------------------------------------------------- names alike


def test_files_whose_names_only_begin_alike_are_left_alone(tmp_path):
    run = Run(tmp_path, max_to_keep=1)
    run.save(1)
    others = [
        "ckpt-best.index",
        "ckpt-best.data-00000-of-00001",
        "ckpt-best-3.manifest",
        "ckpt-best-3.data-00000-of-00001",
        "ckpt-1.data-00000-of-00001.bak",
        "ckpt-1.index.old",
        "ckpt-1.manifest~",
        "ckpt-1",
        "ckpt-007.index",
        "ckpt-007.data-00000-of-00001",
        "ckpt-1.data-00000-of-1",
        "ckpt-5.data-00000-of-00001",  # another program's, which has no index yet
        ".ckpt-best.spare-0",
        ".ckpt.spare-0.bak",
        ".ckpt.spare-x",
        ".ckpt-best.unfinished/part-0.index",
        ".ckpt.unfinished.bak/part-0.index",
        "ckpt-2.d/ckpt-2.index",
        "ckpt-6/ckpt-1.index",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for background in (False, True):
        run = Run(tmp_path, max_to_keep=1, background=background)
        assert run.restored()[1] > 0
        run.save(2, 3, 4)
        run.manager.wait()
    assert [name for name in others if (tmp_path / name).read_text() != "mine"] == []


@pytest.mark.parametrize("background", [False, True])
def test_two_managers_of_one_directory_keep_their_own(tmp_path, background):
    often = Run(tmp_path, max_to_keep=2, background=background)
    best = Run(tmp_path, max_to_keep=1, checkpoint_name="ckpt-best", background=background)
    for number in range(1, 13):
        often.save(number)
        if number % 3 == 0:
            best.save(100 + number)
    for run in (often, best):
        run.manager.wait()
    assert numbers(often) == [11, 12]
    assert numbers(best) == [4]
    assert often.restored() == (str(tmp_path / "ckpt-12"), 12.0)
    assert best.restored() == (str(tmp_path / "ckpt-best-4"), 112.0)
    latest = tf.train.latest_checkpoint(tmp_path)
    assert latest in (str(tmp_path / "ckpt-12"), str(tmp_path / "ckpt-best-4"))
    # Those that are kept for good stay so, though the state file is the other one's.
    often = Run(tmp_path, max_to_keep=1, keep_checkpoint_every_n_hours=0.00001)
    often.save(13, 14, 15)
    kept = sorted(path.name for path in tmp_path.glob("ckpt-[0-9]*.index"))
    best.save(200)
    best.manager.wait()
    often = Run(tmp_path, max_to_keep=1)
    assert numbers(often) == [15]
    often.save(16)
    remaining = {path.name for path in tmp_path.glob("ckpt-[0-9]*.index")}
    assert {*kept, "ckpt-16.index"} - remaining == {"ckpt-15.index"}


def test_two_managers_of_one_name_in_one_process_take_turns(tmp_path):
    first, second = (Run(tmp_path, max_to_keep=2, background=True) for _ in range(2))
    for number in range(1, 11):
        first.save(number)
        second.save(100 + number)
    first.manager.wait()
    second.manager.wait()
    assert len(numbers(first)) == 2
    assert first.restored()[1] == second.restored()[1] == 110.0


# ------------------------------------------------------------------------------ damaged by others

DAMAGES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "counts": b'model_checkpoint_path: "ckpt-3"\nall_model_checkpoint_paths: "ckpt-3"\n'
    b"all_model_checkpoint_timestamps: 1\nall_model_checkpoint_timestamps: 2\n",
    "deep": b"a {" * 10_000,
}


@pytest.mark.parametrize("damage", [*DAMAGES, "directory", "permission"])
def test_a_damaged_state_file_is_a_warning_and_the_directory_is_searched(
    tmp_path, damage, monkeypatch
):
    Run(tmp_path).save(*range(1, 12))
    state = tmp_path / "checkpoint"
    if damage == "directory":
        state.unlink()
        state.mkdir()
        (state / "mine").write_text("mine")
    elif damage == "permission":

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(state_module, "open", refuse, raising=False)
    else:
        state.write_bytes(DAMAGES[damage])
    run = Run(tmp_path)
    assert numbers(run) == [9, 10, 11]
    with pytest.warns(UserWarning, match=r"checkpoint cannot be used: .*found in the directory"):
        assert run.restored() == (str(tmp_path / "ckpt-11"), 11.0)
    if damage == "permission":
        monkeypatch.undo()
        state.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be used"):
        run.save(12)
    if damage == "directory":
        with pytest.warns(UserWarning, match="Give that directory another name"):
            run.save(13)
        assert (state / "mine").read_text() == "mine"
        assert numbers(run) == [11, 12, 13]
        return
    run.save(13)  # it is whole again
    assert numbers(run) == [11, 12, 13]
    assert tf.train.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-13")


def test_warnings_that_are_errors_are_those_of_the_call_in_all_processes(tmp_path):
    Run(tmp_path).save(1)
    (tmp_path / "checkpoint").write_bytes(b"")
    run = Run(tmp_path)
    for call in (run.manager.restore, run.manager.save):
        with pytest.raises(smp.CheckpointError, match=r"UserWarning: .*cannot be used"):
            call()


def test_a_missing_state_file_is_no_fault(tmp_path):
    Run(tmp_path).save(1, 2)
    (tmp_path / "checkpoint").unlink()
    run = Run(tmp_path)
    assert run.restored() == (str(tmp_path / "ckpt-2"), 2.0)
    run.save(3, 4)
    assert numbers(run) == [2, 3, 4]


@pytest.mark.parametrize("content", ["", "7", "[" * 100_000, "directory"])
def test_a_damaged_manifest_leaves_out_its_checkpoint_and_saves_go_on(tmp_path, content):
    run = Run(tmp_path, max_to_keep=2)
    run.save(1, 2)
    manifest = tmp_path / "ckpt-2.manifest"
    if content == "directory":
        manifest.unlink()
        manifest.mkdir()
    else:
        manifest.write_text(content)
    with pytest.warns(UserWarning, match=r"ckpt-2 is damaged .*ckpt-2\.manifest cannot be read"):
        assert run.restored() == (str(tmp_path / "ckpt-1"), 1.0)
    run.save(3, 4, 5)
    assert numbers(run) == [4, 5]
    assert not (tmp_path / "ckpt-2.index").exists()


@pytest.mark.parametrize("ending", ["manifest", "index", "data-00000-of-00001"])
def test_a_directory_in_the_place_of_the_next_file_is_passed_over(tmp_path, ending):
    run = Run(tmp_path, max_to_keep=2)
    run.save(1)
    (tmp_path / f"ckpt-2.{ending}").mkdir()
    assert run.save(2).endswith("ckpt-3")
    assert run.restored() == (str(tmp_path / "ckpt-3"), 2.0)
    with pytest.raises(smp.CheckpointError, match=r"ckpt-2\."):
        run.manager.save(checkpoint_number=2)
    assert run.restored() == (str(tmp_path / "ckpt-3"), 2.0)


# ------------------------------------------------------------------------------ nothing is found


def test_none_is_only_for_a_directory_that_is_not_there_or_has_no_checkpoints(tmp_path):
    assert Run(tmp_path / "absent" / "too").manager.restore() is None
    (tmp_path / "mine.txt").write_text("mine")
    assert Run(tmp_path).manager.restore() is None


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_place_of_the_directory_is_an_error(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    manager = Run(f"{tmp_path}/file{below}").manager
    for look in (
        manager.restore,
        manager.restore_or_initialize,
        lambda: manager.latest_checkpoint,
        lambda: manager.checkpoints,
    ):
        with pytest.raises(smp.CheckpointError, match=r"file is a file; expected a directory"):
            look()


def test_a_directory_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (run.manager.restore, lambda: run.manager.latest_checkpoint):
        with pytest.raises(smp.CheckpointError, match=r"cannot be read: Permission denied"):
            look()


def test_if_all_are_damaged_it_is_an_error_with_each(tmp_path):
    run = Run(tmp_path)
    run.save(1, 2)
    (tmp_path / "ckpt-1.index").unlink()
    (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(smp.CheckpointError) as caught:
        run.manager.restore()
    for text in ("nothing was changed", "there is no file ckpt-1.index", "has 0 bytes, not"):
        assert text in str(caught.value)
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(smp.CheckpointError, match=r"there is no file ckpt-1\.index"):
        run.manager.restore()


def test_checkpoints_that_somebody_has_removed_are_no_error(tmp_path):
    run = Run(tmp_path)
    run.save(1, 2)
    for file in tmp_path.glob("ckpt-2*"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"ckpt-2 .*there is no file ckpt-2\.index"):
        assert run.restored() == (str(tmp_path / "ckpt-1"), 1.0)
    for file in tmp_path.glob("ckpt-1*"):
        file.unlink()
    with pytest.warns(UserWarning, match="not there any more"):
        assert run.manager.restore() is None


def test_checkpoints_of_plain_tensorflow_without_a_state_file_are_found_and_never_removed(tmp_path):
    value = tf.Variable(tf.fill([100], 4.0))
    for number in (1, 2, 10):
        tf.train.Checkpoint(value=value).write(str(tmp_path / f"ckpt-{number}"))
    run = Run(tmp_path, max_to_keep=1)
    assert run.manager.checkpoints == []
    assert run.manager.latest_checkpoint == str(tmp_path / "ckpt-10")
    assert run.restored() == (str(tmp_path / "ckpt-10"), 4.0)
    run.save(11, 12)
    assert numbers(run) == [12]
    assert len(list(tmp_path.glob("ckpt-*.index"))) == 4
    # They are what is left when those of this manager are damaged.
    (tmp_path / "ckpt-12.index").write_bytes(b"")
    with pytest.warns(UserWarning, match="ckpt-12 is damaged"):
        assert run.restored() == (str(tmp_path / "ckpt-10"), 4.0)


# ---------------------------------------------------------------------------------- two programs

PROGRAM = """
import sys
import tensorflow as tf
import opensmp as smp

smp.init({"partitions": 1})
manager = smp.CheckpointManager(tf.train.Checkpoint(value=tf.Variable(tf.ones([100]))), sys.argv[1])
print(manager.save(), flush=True)
sys.stdin.read()
"""


def test_a_second_program_is_refused_by_name_and_goes_on_when_the_first_was_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env=environ_of_tests(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout.readline().strip() == str(tmp_path / "ckpt-1")
            run = Run(tmp_path)
            assert run.restored() == (str(tmp_path / "ckpt-1"), 1.0)  # reading is no conflict
            with pytest.raises(
                smp.CheckpointError,
                match=rf"(?s)not saved to .*Another program.*process {program.pid} on host .*End",
            ):
                run.save(5)
            assert numbers(run) == [1]
            best = Run(tmp_path, checkpoint_name="best")
            best.save(7)  # another name is no conflict
            program.send_signal(signal.SIGKILL)
            program.wait(240)
            assert run.save(2) == str(tmp_path / "ckpt-2")
        finally:
            program.kill()


def test_what_another_program_is_about_to_move_is_left_to_it(tmp_path):
    run = Run(tmp_path)
    run.save(1)
    (tmp_path / ".ckpt.unfinished").mkdir()
    for name in ("ckpt-1.index", "ckpt-1.manifest", "ckpt-1.data-00000-of-00001"):
        (tmp_path / name).rename(tmp_path / ".ckpt.unfinished" / name)
    run.manager._shelf._lock.release()
    holder = "from opensmp.saving.checkpoint.directory.lock import DirectoryLock; "
    holder += "import sys; l = DirectoryLock("
    holder += "sys.argv[1]); l.take(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / ".ckpt.lock"],
        env=environ_of_tests(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout.readline().strip() == "held"
            with pytest.warns(UserWarning, match="not there any more"):
                assert run.manager.restore() is None
            program.communicate("", timeout=240)
        finally:
            program.kill()
    assert run.restored() == (str(tmp_path / "ckpt-1"), 1.0)
    assert not (tmp_path / ".ckpt.lock").exists()  # a program that only reads holds no lock


# ------------------------------------------------------------------------------- paths of all kinds


@pytest.mark.parametrize(
    "name",
    ["a b", "lr=[0.1]", "a*", "a?b", "\u00fc\u4e2d", "tail/", "run.d", "back\\slash", "%s{}"],
)
def test_directories_of_any_name_save_and_restore(tmp_path, name):
    run = Run(f"{tmp_path}/{name}", max_to_keep=2)
    run.save(*range(1, 12))
    assert numbers(run) == [10, 11]
    run = Run(pathlib.Path(tmp_path) / name)
    path = os.path.join(tmp_path, name.rstrip("/"), "ckpt-11")
    assert run.restored() == (path, 11.0)
    assert run.restored(path) == (path, 11.0)
    assert run.restored(f"{tmp_path}/{name}") == (path, 11.0)
    for ending in (".index", ".manifest", ".data-00000-of-00001"):
        assert Run(tmp_path / "other").restored(path + ending) == (path, 11.0)


def test_values_of_variables_made_later_come_from_a_directory_of_any_name(tmp_path):
    run = Run(tmp_path / "[1]")
    run.save(3)
    later = tf.train.Checkpoint()
    assert smp.CheckpointManager(later, tmp_path / "[1]").restore(partial=True)
    gc.collect()
    later.value = tf.Variable(tf.zeros([100]))
    assert set(later.value.numpy()) == {3.0}


def test_a_directory_beside_the_files_of_the_same_name_is_not_taken_for_them(tmp_path):
    run = Run(tmp_path)
    path = run.save(1)
    Run(tmp_path / "ckpt-1").save(7)
    assert run.restored() == (path, 1.0)
    assert run.restored(path) == (path, 1.0)


def test_paths_are_those_of_the_moment_they_were_given(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = Run("runs/a")
    run.save(1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.save(2)
    assert run.restored() == (str(tmp_path / "runs" / "a" / "ckpt-2"), 2.0)
    assert os.listdir(tmp_path / "elsewhere") == []
    monkeypatch.chdir(tmp_path)
    assert run.restored("runs/a/ckpt-1")[1] == 1.0


@pytest.mark.parametrize("number", [-1, 7.5, "7", 10**18, tf.constant(7.0)])
def test_a_number_that_is_none_is_refused(tmp_path, number):
    run = Run(tmp_path)
    with pytest.raises(smp.CheckpointError, match="checkpoint_number must be"):
        run.manager.save(number)
    assert run.save(1) == str(tmp_path / "ckpt-1")
    for good in (tf.Variable(20, dtype=tf.int64), tf.constant(30), np.int32(40)):
        assert run.manager.save(good) == str(tmp_path / f"ckpt-{int(good)}")


def test_a_path_that_is_none_is_refused(tmp_path):
    with pytest.raises(smp.CheckpointError, match="Expected a path as save_path; received 5"):
        Run(tmp_path).manager.restore(5)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    run = Run("~/runs")
    path = run.save(1)
    assert path == str(tmp_path / "runs" / "ckpt-1")
    assert run.restored("~/runs/ckpt-1") == (path, 1.0)


def test_a_directory_that_is_renamed_while_the_program_runs_is_made_anew(tmp_path):
    run = Run(tmp_path / "a")
    run.save(1, 2)
    (tmp_path / "a").rename(tmp_path / "c")
    before = content(tmp_path / "c")
    assert run.save(3) == str(tmp_path / "a" / "ckpt-3")
    assert numbers(run) == [3]
    after = content(tmp_path / "c")
    assert {name: after[name] for name in before if name != ".ckpt.lock"} == {
        name: text for name, text in before.items() if name != ".ckpt.lock"
    }
    assert Run(tmp_path / "c").restored() == (str(tmp_path / "c" / "ckpt-2"), 2.0)
