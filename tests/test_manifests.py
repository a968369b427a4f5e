"""The Kubernetes manifests of the docs, by the models that their projects generate from schemas."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"


def manifests() -> list[Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [each for block in blocks for each in yaml.safe_load_all(block) if each]


def manifest(kind: str) -> Any:
    (found,) = [each for each in manifests() if each["kind"] == kind]
    return found


def test_every_kind_is_looked_at():
    assert sorted(each["kind"] for each in manifests()) == ["JobSet", "TFJob"]


def read_tf_job(given: Any) -> Any:
    """What Kubeflow's training operator makes of it; what it does not know is lost."""
    training = pytest.importorskip("kubeflow.training", reason="kubeflow-training not installed")
    client = training.ApiClient()
    response = types.SimpleNamespace(data=json.dumps(given))
    job = client.deserialize(response, "KubeflowOrgV1TFJob")
    return client.sanitize_for_serialization(job)


def read_job_set(given: Any) -> Any:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api not installed"
    )
    return models.JobsetV1alpha2JobSet.from_dict(given).to_dict()


READERS = {"TFJob": read_tf_job, "JobSet": read_job_set}


@pytest.mark.parametrize("kind", READERS)
def test_the_models_know_every_field_and_its_type(kind):
    given = manifest(kind)
    assert lost(given, READERS[kind](given)) == []


@pytest.mark.parametrize("kind", READERS)
def test_a_field_that_is_not_known_would_be_found(kind):
    given = json.loads(json.dumps(manifest(kind)))
    given["spec"]["replicaz"] = {}
    for container in containers(given):
        container["comand"] = ["python"]
    found = lost(given, READERS[kind](given))
    assert any("replicaz" in each for each in found)
    assert any("comand" in each for each in found)


def containers(given: Any) -> list[Any]:
    if isinstance(given, list):
        return [each for value in given for each in containers(value)]
    if not isinstance(given, dict):
        return []
    return [*given.get("containers", []), *containers(list(given.values()))]


def lost(given: Any, read: Any, place: str = "") -> list[str]:
    """Places of what was given and is not in what was read."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [
            each
            for key, value in given.items()
            for each in (
                lost(value, read[key], f"{place}/{key}") if key in read else [f"{place}/{key}"]
            )
        ]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return [each for i, (a, b) in pairs for each in lost(a, b, f"{place}/{i}")]
    return [] if given == read else [f"{place}: {given!r} became {read!r}"]
