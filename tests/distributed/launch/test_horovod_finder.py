from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import output_of

from opensmp.distributed.launch import horovod_finder

INSTALL = "from opensmp.distributed.launch.horovod_finder import install; install(); install()\n"


def run_file(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, horovod_finder.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=60,
    )


def test_horovod_is_found_where_there_is_none():
    out = output_of(
        INSTALL
        + """
import sys
names = [getattr(f, "__qualname__", "") for f in sys.meta_path]
assert names.count("HorovodFinder") == 1 and names[-1] == "HorovodFinder"
import horovod.tensorflow as hvd
from horovod.tensorflow import allreduce
from opensmp.compat import horovod as face
assert hvd.allreduce is face.allreduce is allreduce and hvd.Average == face.Average
assert face.__spec__.name == "opensmp.compat.horovod"
for name in ("alltoall", "Compression"):
    try:
        getattr(hvd, name)
    except AttributeError as error:
        print(error)
import horovod
try:
    horovod.run
except AttributeError as error:
    print(error)
try:
    import horovod.torch
except ModuleNotFoundError as error:
    print(error)
"""
    )
    lines = out.splitlines()
    assert "alltoall does not exist here" in lines[0]
    assert "allreduce, broadcast_variables" in lines[1]
    assert "horovod.run does not exist here" in lines[2]
    assert "horovod.torch does not exist here" in lines[3]


def test_installed_horovod_wins(tmp_path):
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tensorflow.py").write_text("name = 'the real one'")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n" + INSTALL
    out = output_of(code + "import horovod.tensorflow as hvd; print(hvd.name)")
    assert out == "the real one"


def test_installed_horovod_without_tensorflow_is_not_completed(tmp_path):
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n" + INSTALL
    out = output_of(
        code + "try:\n    import horovod.tensorflow\nexcept ImportError as e:\n    print(e)"
    )
    assert out == "No module named 'horovod.tensorflow'"


def test_vendor_path_and_configuration_install_it():
    out = output_of(
        """
import sys
def there():
    return any(getattr(f, "__qualname__", "") == "HorovodFinder" for f in sys.meta_path)
import opensmp as smp
print(there())
smp.init({"horovod": True})
print(there())
sys.meta_path.pop()
import smdistributed.modelparallel.tensorflow
print(there())
"""
    )
    assert out.split() == ["False", "True", "True"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("value = 7")
    path = tmp_path / "script.py"
    path.write_text(
        "import sys, neighbour, pickle\n"
        "class Thing: pass\n"
        "assert isinstance(pickle.loads(pickle.dumps(Thing())), Thing)\n"
        "assert 'tensorflow' not in sys.modules and 'opensmp' not in sys.modules\n"
        "print(__name__, __file__, sys.argv, neighbour.value, sys.path[0])\n"
        "if len(sys.argv) > 2: raise ValueError('a bug')\n"
    )
    return path


def test_script_runs_as_without_a_launcher(script):
    direct = subprocess.run(
        [sys.executable, str(script), "a"], capture_output=True, text=True, check=True, timeout=60
    )
    assert run_file(script, "a").stdout == direct.stdout
    assert direct.stdout.startswith("__main__ ")


def test_module_runs_as_without_a_launcher(script):
    direct = subprocess.run(
        [sys.executable, "-m", "script", "a"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=script.parent,
    )
    assert run_file("-m", "script", "a", cwd=script.parent).stdout == direct.stdout


def test_error_of_a_script_ends_it_with_its_line(script):
    done = run_file(script, "a", "b")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: a bug"
    assert f'{script}", line 6' in done.stderr


def test_script_that_is_not_there_is_an_error(tmp_path):
    done = run_file(tmp_path / "none.py")
    assert done.returncode != 0
    assert "none.py" in done.stderr
