"""The oldest TensorFlow and Keras: one place says which, and all others say the same."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from helpers import run_python

import opensmp
from opensmp.base import versions as _versions

ROOT = Path(__file__).resolve().parents[2]
IMPORT = "import opensmp, sys; print('fine', 'tensorflow' in sys.modules)"


def put(folder: Path, distribution: str, version: str, module: str, source: str = "") -> None:
    """A module with the metadata of a distribution, as pip leaves them."""
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text(source)
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n\nVersion: 0.0\n"
    (metadata / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.19.0", (2, 19)),
        ("2.19.0rc1", (2, 19)),
        ("2.9.3", (2, 9)),
        ("2.22.0.dev20260101", (2, 22)),
        ("2.19.0+nv25.3", (2, 19)),
        ("main", None),
        ("", None),
    ],
)
def test_release(version, expected):
    assert _versions.release(version) == expected


def test_versions_are_compared_as_numbers():
    assert _versions.is_too_old("tensorflow", "2.9.3")
    assert not _versions.is_too_old("tensorflow", "2.100.0")
    assert not _versions.is_too_old("tensorflow", "3.0.0")
    assert not _versions.is_too_old("tensorflow", "built by hand")


def test_what_this_runs_with_is_new_enough():
    assert not _versions.is_too_old("tensorflow", tf.__version__)
    assert not _versions.is_too_old("keras", keras.__version__)


class TestInstalled:
    def test_a_distribution_is_known_by_any_of_its_names(self, tmp_path):
        for name in ("tensorflow-cpu", "tf-nightly"):
            put(tmp_path, name, "2.30.1", "tensorflow")
        found = _versions.installed("tensorflow", tmp_path)
        assert found == {"tensorflow-cpu": "2.30.1", "tf-nightly": "2.30.1"}

    def test_nothing_is_known_without_metadata(self, tmp_path):
        (tmp_path / "tensorflow").mkdir()
        assert _versions.installed("tensorflow", tmp_path) == {}

    def test_what_was_half_removed_says_nothing(self, tmp_path):
        (tmp_path / "tensorflow-2.3.0.dist-info").mkdir()
        assert _versions.installed("tensorflow", tmp_path) == {}


class TestTooOld:
    def test_all_that_is_too_old_is_told_at_once(self):
        found = {"tensorflow": {"tensorflow-cpu": "2.18.1"}, "keras": {"keras": "2.15.0"}}
        assert _versions.too_old(found) == (
            "opensmp needs TensorFlow 2.19 or newer and Keras 3.9 or newer, but "
            "tensorflow-cpu 2.18.1 and keras 2.15.0 are installed. Run: "
            'python -m pip install --upgrade "tensorflow-cpu>=2.19" "keras>=3.9"'
        )

    def test_of_several_distributions_the_newest_counts(self):
        versions = {"tensorflow": "2.18.0", "tensorflow-cpu": "2.21.0"}
        assert _versions.too_old({"tensorflow": versions}) is None

    def test_of_several_distributions_that_are_too_old_one_is_mended(self):
        versions = {"tensorflow": "2.18.0", "tensorflow-cpu": "2.17.0"}
        message = _versions.too_old({"tensorflow": versions})
        assert "but tensorflow 2.18.0 and tensorflow-cpu 2.17.0 are installed" in message
        assert message.endswith('--upgrade "tensorflow>=2.19"')

    def test_nothing_known_is_no_fault(self):
        assert _versions.too_old({"tensorflow": {}, "keras": {}}) is None


class TestImport:
    """`import opensmp` beside packages of other versions."""

    def run(self, folder: Path, code: str = IMPORT) -> tuple[str, str]:
        done = run_python(code, env={"PYTHONPATH": f"{folder}:{ROOT / 'src'}"})
        return done.stdout, done.stderr

    def test_a_version_that_is_too_old_is_refused_without_importing_it(self, tmp_path):
        put(tmp_path, "tf-nightly", "2.18.0.dev1", "tensorflow", "raise SystemExit('imported')")
        _, error = self.run(tmp_path)
        assert "ImportError: opensmp needs TensorFlow 2.19 or newer and Keras 3.9" in error
        assert "but tf-nightly 2.18.0.dev1 is installed" in error
        assert 'python -m pip install --upgrade "tf-nightly>=2.19"' in error

    def test_metadata_of_another_folder_is_about_another_copy(self, tmp_path):
        put(tmp_path / "other", "tensorflow", "2.3.0", "nothing")
        put(tmp_path / "here", "tensorflow", "2.19.0", "tensorflow")
        out, _ = self.run(Path(f"{tmp_path / 'other'}:{tmp_path / 'here'}"))
        assert out.split() == ["fine", "False"]

    def test_a_version_without_metadata_is_refused_when_it_is_imported(self, tmp_path):
        for module, version in (("tensorflow", "2.18.0"), ("keras", "3.9.0")):
            (tmp_path / module).mkdir()
            (tmp_path / module / "__init__.py").write_text(f"__version__ = {version!r}")
        out, error = self.run(tmp_path, f"{IMPORT}\nopensmp.init")
        assert out.split() == ["fine", "False"]
        assert "but tensorflow 2.18.0 is installed" in error

    def test_a_version_newer_than_all_that_was_run_is_not_refused(self, tmp_path):
        put(tmp_path, "tensorflow", "3.1.0", "tensorflow")
        put(tmp_path, "keras", "4.0.0", "keras")
        out, _ = self.run(tmp_path)
        assert out.split() == ["fine", "False"]


class TestOneSourceOfTruth:
    def test_of_the_dependencies(self):
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        floors = re.findall(r'"(tensorflow|keras)(?:-cpu|\[and-cuda\])?>=([\d.]+)"', text)
        expected = [("keras", "keras"), ("tensorflow", "cpu"), ("tensorflow", "gpu")]
        assert floors == [(module, _versions.oldest(module)) for module, _ in expected]

    @pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/versions.md"])
    def test_of_the_pages(self, page):
        text = " ".join((ROOT / page).read_text("utf-8").split())
        said = re.findall(r"TensorFlow ([\d.]+) or newer and Keras ([\d.]+) or newer", text)
        assert said
        assert set(said) == {(_versions.oldest("tensorflow"), _versions.oldest("keras"))}

    def test_of_the_pythons(self):
        pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
        pythons = re.findall(r"Python :: (3\.\d+)", pyproject)
        assert f'requires-python = ">={pythons[0]}"' in pyproject
        for page in ("README.md", "docs/install.md"):
            assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / page).read_text("utf-8")


def test_the_version_of_opensmp_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '\ndynamic = ["version"]\n' in text
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {_versions.OWN}\n" in cited
    assert opensmp.__version__ == _versions.OWN
