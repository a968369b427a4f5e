from __future__ import annotations

from opensmp.distributed.launch.init_markers import Layout, clear_marks, mark, read_marks


def test_the_launcher_reads_who_has_come_and_with_which_layout(tmp_path):
    environ = {"OPENSMP_RUN_MARKS": str(tmp_path)}
    mark(environ, 10, Layout(4, 2))
    mark(environ, 2, Layout(4, None))
    (tmp_path / "3").write_text("half a no")
    assert read_marks(str(tmp_path)) == {10: Layout(4, 2), 2: Layout(4, None)}
    clear_marks(str(tmp_path))
    assert read_marks(str(tmp_path)) == {}


def test_other_launchers_need_no_marks(tmp_path):
    mark({}, 0, Layout(1, None))
    mark({"OPENSMP_RUN_MARKS": str(tmp_path / "gone")}, 0, Layout(1, None))
    assert list(tmp_path.iterdir()) == []
