from __future__ import annotations

import json
from typing import Any

import pytest

from opensmp.base.message_text import shown
from opensmp.distributed.launch.conventions.tf_config import read_tf_config
from opensmp.errors import LaunchError


def text_of(index: Any, kind: Any = "worker", worker: Any = ("a:1", "b:1")) -> str:
    return json.dumps({"cluster": {"worker": worker}, "task": {"type": kind, "index": index}})


def test_place_is_that_of_the_task():
    place = read_tf_config(text_of(1, worker=["a:1", "[::1]:2"]))
    assert place is not None
    assert (place.rank, place.addresses, place.hosts) == (1, ("a:1", "[::1]:2"), ("a", "::1"))
    assert read_tf_config(text_of("1")).rank == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["", " ", "{}", '{"cluster": {}}', text_of(0, worker=["a:1"])])
def test_cluster_of_one_is_none(text):
    assert read_tf_config(text) is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "too many digits"),
        ("3", "no JSON object"),
        ('{"cluster": [], "cluster": {}}', "'cluster' comes twice"),
        ('{"cluster": null}', "its cluster is None, no JSON object"),
        ('{"task": [], "cluster": 1}', "its task is"),
        (text_of(True), "its task is"),
        (text_of(1.0), "its task is"),
        (text_of(1e300), "its task is"),
        (text_of("\u0661"), "its task is"),
        (text_of("9" * 5000), "its task is"),
        (text_of(-1), "its task is"),
        (text_of(0, kind=["worker"]), "its task is"),
        (text_of(0, worker={"0": "a:1", "1": "b:1"}), "no list"),
        (text_of(0, worker=["a:1", "a:1"]), "worker 1 has the same address as worker 0"),
        (text_of(0, worker=["a:1", None]), "the address of worker 1 is None, no text"),
        (text_of(0, worker=["a:1", "b\0:1"]), "the address of worker 1 is 'b"),
        (text_of(0, worker=["a:1"] * 200_000), "these are 200000 tasks"),
    ],
    ids=shown,
)
def test_what_names_no_rank_is_refused_by_name(text, part):
    with pytest.raises(LaunchError, match="TF_CONFIG names no rank") as caught:
        read_tf_config(text)
    assert part in str(caught.value)


def test_all_faults_come_at_once():
    with pytest.raises(LaunchError) as caught:
        read_tf_config(text_of(7, worker=["a", "b:1", "b:1", 4]))
    for part in ("its task is", "worker 0 is 'a'", "worker 2 has the same", "worker 3 is 4, no"):
        assert part in str(caught.value)
