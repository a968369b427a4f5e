"""What the pages show can be copied: programs compile, shell commands and YAML parse."""

import ast
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(*languages):
    """Pairs of the place of a block and its text, for all pages."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found[2] in languages:
                lines = (line.removeprefix(found[1]) for line in found[3].splitlines())
                yield f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", "\n".join(lines)


def test_programs_compile():
    faults = []
    for place, text in blocks("python", "py"):
        try:
            compile(text, place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError as error:
            faults.append(f"{place}: {error}")
    assert not faults


def test_shell_commands_parse():
    found = list(blocks("sh"))
    assert len(found) > 20
    whole = "\n".join(itertools.chain.from_iterable((f"# {place}", text) for place, text in found))
    parsed = subprocess.run(
        ["bash", "-n"], input=whole, text=True, capture_output=True, timeout=60, check=False
    )
    assert not parsed.returncode, parsed.stderr


def test_manifests_parse():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra docs")
    kinds = {yaml.safe_load(text)["kind"] for _, text in blocks("yaml")}
    assert {"TFJob", "JobSet"} <= kinds


INSTRUCTIONS = {"FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD", "ENV", "EXPOSE", "ARG"}


def test_container_files_have_known_instructions_and_their_commands_are_lists():
    found = list(blocks("dockerfile"))
    assert found
    for place, text in found:
        lines = re.sub(r"\\\n", " ", text).splitlines()
        pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
        assert pairs[0][0] == "FROM", place
        assert {name for name, _ in pairs} <= INSTRUCTIONS, place
        commands = [json.loads(rest) for name, rest in pairs if name in ("ENTRYPOINT", "CMD")]
        assert commands, place
        assert all(isinstance(word, str) for each in commands for word in each), place


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", navigation))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} == named


def test_issue_forms_are_complete():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra docs")
    folder = DOCS.parent / ".github" / "ISSUE_TEMPLATE"
    forms = [path for path in sorted(folder.glob("*.yml")) if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields)
        assert all(field["attributes"]["label"] for field in form["body"])
