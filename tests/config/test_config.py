from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensmp.config import Config
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ConfigError, SmpError


def faults_of(*args: Any, **kwargs: Any) -> list[str]:
    """The numbered lines of the error that resolving raises."""
    with pytest.raises(ConfigError) as caught:
        Config.resolve(*args, **kwargs)
    first, *lines = str(caught.value).split("\n")
    assert first.startswith("Config: the configuration has ")
    assert [line.split(". ", 1)[0] for line in lines] == [
        f"  {number}" for number in range(1, len(lines) + 1)
    ]
    return [line.split(". ", 1)[1] for line in lines]


# ------------------------------------------------------------------------------- the value


def test_defaults_are_those_of_the_api():
    assert Config.resolve({}).to_dict() == {
        "partitions": 1,
        "microbatches": 1,
        "pipeline": "interleaved",
        "optimize": "memory",
        "placement_strategy": "cluster",
        "auto_partition": True,
        "default_partition": 0,
        "contiguous": True,
        "horovod": False,
        "active_microbatches": None,
        "devices": None,
        "plan": None,
        "processes_per_replica": None,
        "transport": "auto",
        "pieces_per_partition": 1,
        "check_finite": False,
        "shard_optimizer_state": False,
        "recompute": "none",
        "offload": "none",
        "offload_folder": None,
        "wire_dtype": "none",
        "device": None,
    }


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(2).partitions = 3  # type: ignore[misc]


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_active_microbatches_are_left_to_the_schedule_by_default(pipeline):
    keys = {"partitions": 2, "microbatches": 16, "pipeline": pipeline}
    assert Config.resolve(keys).active_microbatches is None
    assert Config(**keys).active_microbatches is None
    assert Config(**keys, active_microbatches=None) == Config(**keys)
    assert Config.resolve({**keys, "active_microbatches": 16}).active_microbatches == 16


def test_every_key_of_the_dict_arrives():
    keys = {
        "partitions": 2,
        "microbatches": 4,
        "pipeline": "simple",
        "optimize": "speed",
        "placement_strategy": "spread",
        "auto_partition": False,
        "default_partition": 1,
        "contiguous": False,
        "horovod": True,
        "active_microbatches": 8,
        "devices": ["CPU:1", "CPU:0"],
        "plan": None,
        "processes_per_replica": 1,
        "transport": "collective",
        "pieces_per_partition": 2,
        "check_finite": True,
        "shard_optimizer_state": True,
        "recompute": {"default": "none", "partitions": {"0": "full"}, "layers": {"a_*": "full"}},
        "offload": {"0": "residuals"},
        "offload_folder": "/scratch",
        "wire_dtype": "bfloat16",
        "device": {"bandwidth": 9e11, "memory": 16000000000},
    }
    assert Config.resolve(keys).to_dict() == keys


@pytest.mark.parametrize(
    ("given_plan", "stored", "shown"),
    [
        ("plan.json", "plan.json", "plan.json"),
        (Path("plans/one.json"), "plans/one.json", "plans/one.json"),
        (
            {"student": Path("s.json"), "net": "n.json"},
            (("net", "n.json"), ("student", "s.json")),
            {"net": "n.json", "student": "s.json"},
        ),
    ],
)
def test_plan_is_a_path_or_a_path_for_each_model(given_plan, stored, shown):
    config = Config.resolve({"plan": given_plan})
    assert config.plan == stored
    assert config.to_dict()["plan"] == shown
    assert Config.resolve(config.to_dict()) == config
    assert hash(config) == hash(Config.resolve({"plan": given_plan}))


def test_plan_path_is_that_of_the_model():
    assert Config.resolve({}).plan_path("net") is None
    assert Config.resolve({"plan": "a.json"}).plan_path("net") == "a.json"
    several = Config.resolve({"plan": {"net": "a.json"}})
    assert (several.plan_path("net"), several.plan_path("teacher")) == ("a.json", None)


def test_text_is_one_line_with_every_key():
    text = str(Config(partitions=2, microbatches=4))
    assert text.startswith("partitions=2, microbatches=4, pipeline='interleaved', ")
    assert "\n" not in text
    assert all(f"{field.name}=" in text for field in dataclasses.fields(Config))


@given(
    partitions=st.integers(1, 8),
    microbatches=st.integers(1, 32),
    pipeline=st.sampled_from(sorted(PIPELINES)),
    auto_partition=st.booleans(),
    devices=st.sampled_from([None, "cpu", "gpu"]),
)
def test_dict_of_a_config_resolves_to_the_same_config(**keys):
    config = Config(**keys)
    assert Config.resolve(json.loads(json.dumps(config.to_dict()))) == config


def test_config_made_directly_is_checked_as_well():
    with pytest.raises(ConfigError, match=r"2 faults(.|\n)*partitions \(Config\)(.|\n)*optimize"):
        Config(partitions=0, optimize="size")


# ----------------------------------------------------------------------------- precedence


def test_dict_wins_over_flag_over_variable_over_service():
    sources: dict[str, Any] = {
        "explicit": {"partitions": 2},
        "flags": {"partitions": 3, "microbatches": 3, "optimize": None},
        "environ": {
            "OPENSMP_PARTITIONS": "4",
            "OPENSMP_MICROBATCHES": "4",
            "OPENSMP_OPTIMIZE": "speed",
            "SM_HP_MP_PARAMETERS": json.dumps(
                {
                    "partitions": 5,
                    "microbatches": 5,
                    "optimize": "memory",
                    "pipeline": "simple",
                }
            ),
        },
    }
    explicit = sources.pop("explicit")
    config = Config.resolve(explicit, **sources)
    assert (config.partitions, config.microbatches) == (2, 3)
    assert (config.optimize, config.pipeline) == ("speed", "simple")


def test_alias_in_a_dict_wins_over_the_key_in_a_variable():
    config = Config.resolve({"pipeline_parallel_degree": 4}, environ={"OPENSMP_PARTITIONS": "2"})
    assert config.partitions == 4


def test_key_and_alias_may_agree():
    assert Config.resolve({"partitions": 2, "pipeline_parallel_degree": 2}).partitions == 2


def test_nothing_is_read_from_the_environment_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("OPENSMP_PARTITIONS", "3")
    assert Config.resolve({}).partitions == 1


@pytest.mark.parametrize(
    ("keys", "default", "expected"),
    [
        ({}, 4, 4),
        ({"partitions": 2}, 4, 2),
        ({"devices": "cpu"}, 4, 1),
        ({"devices": "gpu"}, 4, 4),
        ({"devices": ["CPU:0", "CPU:1", "CPU:2"]}, 1, 3),
    ],
)
def test_partitions_follow_from_the_devices_when_not_given(keys, default, expected):
    assert Config.resolve(keys, default_partitions=default).partitions == expected


# ------------------------------------------------------------------------- reading values


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PARTITIONS", " 2 ", 2),
        ("PIPELINE_PARALLEL_DEGREE", "2", 2),
        ("MICROBATCHES", "8", 8),
        ("AUTO_PARTITION", "True", True),
        ("CONTIGUOUS", "false", False),
        ("CONTIGUOUS", "0", False),
        ("HOROVOD", "on", True),
        ("PIPELINE", "simple", "simple"),
        ("DEVICES", "cpu", "cpu"),
        ("DEVICES", "CPU:0, cpu:1", ("CPU:0", "CPU:1")),
        ("PLAN", " plan.json ", "plan.json"),
        ("PLAN", '{"net": "plan.json"}', (("net", "plan.json"),)),
    ],
)
def test_variable_text_is_read(variable, text, expected):
    config = Config.resolve(
        environ={f"OPENSMP_{variable}": text},
        default_partitions=2,
    )
    key = "partitions" if variable == "PIPELINE_PARALLEL_DEGREE" else variable.lower()
    assert getattr(config, key) == expected


@pytest.mark.parametrize("variable", ["OPENSMP_PARTITIONS", "SM_HP_MP_PARAMETERS"])
def test_empty_variable_counts_as_not_set(variable):
    assert Config.resolve(environ={variable: " "}).partitions == 1


def test_service_may_pass_numbers_and_booleans_as_text():
    text = '{"partitions": "2", "microbatches": 4, "horovod": "True", "contiguous": false}'
    config = Config.resolve(environ={"SM_HP_MP_PARAMETERS": text})
    assert (config.partitions, config.microbatches) == (2, 4)
    assert (config.horovod, config.contiguous) == (True, False)


def test_numpy_integer_is_an_integer():
    config = Config.resolve({"partitions": np.int64(2)})
    assert type(config.partitions) is int


@pytest.mark.parametrize("name", ["CPU:1", "cpu:1", "/device:CPU:1", "device:cpu:1", " CPU:01"])
def test_device_names_have_one_form(name):
    assert Config.resolve({"devices": [name]}).devices == ("CPU:1",)


# --------------------------------------------------------------------- misuse and messages

MISUSES = [
    # (explicit, environ, parts of the one fault)
    ({"partitions": "2"}, {}, ["partitions (smp.init dict)", "'2' (str)", "an integer >= 1"]),
    ({"partitions": True}, {}, ["partitions", "True (bool)", "an integer >= 1"]),
    ({"partitions": 2.0}, {}, ["partitions", "2.0 (float)", "an integer >= 1"]),
    ({"partitions": None}, {}, ["partitions", "None (NoneType)", "an integer >= 1"]),
    ({"partitions": 0}, {}, ["partitions", "0 (int)", "an integer >= 1"]),
    ({"microbatches": -4}, {}, ["microbatches", "-4 (int)", "an integer >= 1"]),
    ({"active_microbatches": 0}, {}, ["active_microbatches", "0 (int)", "an integer >= 1"]),
    ({"default_partition": -1}, {}, ["default_partition", "-1 (int)", "an integer >= 0"]),
    ({"auto_partition": 1}, {}, ["auto_partition", "1 (int)", "True or False"]),
    ({"contiguous": "no"}, {}, ["contiguous", "'no' (str)", "True or False"]),
    ({"horovod": None}, {}, ["horovod", "None (NoneType)", "True or False"]),
    (
        {"pipeline": "simpel"},
        {},
        [
            "pipeline",
            "'simpel' (str)",
            "'zb_v', 'zero_bubble', the path of a",
            "did you mean 'simple'?",
        ],
    ),
    ({"pipeline": 1}, {}, ["pipeline", "1 (int)", "'zb_v', 'zero_bubble', the path of a"]),
    ({"optimize": "size"}, {}, ["optimize", "'size' (str)", "'memory' or 'speed'"]),
    (
        {"placement_strategy": "clustered"},
        {},
        ["placement_strategy", "'cluster' or 'spread'", "did you mean 'cluster'?"],
    ),
    (
        {"microbatch": 4},
        {},
        ["microbatch (smp.init dict)", "4 (int)", "unknown", "did you mean 'microbatches'?"],
    ),
    ({"Partitions": 4}, {}, ["Partitions", "unknown", "did you mean 'partitions'?"]),
    ({"xyzzy": 4}, {}, ["xyzzy", "unknown", "known keys: partitions, ", "devices"]),
    ({3: 4}, {}, ["3 (smp.init dict)", "unknown", "known keys: "]),
    (["partitions", 2], {}, ["smp.init dict", "(list)", "a dict such as"]),
    (
        {"partitions": 2, "pipeline_parallel_degree": 4},
        {},
        ["pipeline_parallel_degree", "4 (int)", "partitions (smp.init dict) is 2 (int)"],
    ),
    (
        {"partitions": 2, "auto_partition": False},
        {},
        [
            "default_partition: not given",
            "auto_partition is False (smp.init dict)",
            '"default_partition": 0',
        ],
    ),
    (
        {"partitions": 2, "default_partition": 2},
        {},
        ["default_partition", "2 (int)", "partitions is 2", "from 0 to 1"],
    ),
    ({"default_partition": 1}, {}, ["default_partition", "partitions is 1", "from 0 to 0"]),
    (
        {"pipeline": "simple", "microbatches": 8, "active_microbatches": 4},
        {},
        ["active_microbatches", "4 (int)", "'simple'", "all 8 microbatches", "8 or more"],
    ),
    (
        {"partitions": 3, "devices": ["CPU:0", "CPU:1"]},
        {},
        ["devices", "names 2 devices", "partitions is 3", "one device per partition"],
    ),
    ({"devices": "tpu"}, {}, ["devices", "'tpu' (str)", "'cpu', 'gpu', a list"]),
    ({"devices": []}, {}, ["devices", "[] (list)", "a list of different logical devices"]),
    ({"devices": ["CPU:0", "TPU:1"]}, {}, ["devices", "'TPU:1' is not a logical device"]),
    ({"devices": ["CPU:0", 1]}, {}, ["devices", "1 is not a logical device"]),
    ({"devices": ["CPU:0", "cpu:0"]}, {}, ["devices", "cannot hold two partitions"]),
    ({"plan": 3}, {}, ["plan (smp.init dict)", "3 (int)", "the path of a plan's JSON file"]),
    ({"plan": ""}, {}, ["plan", "'' (str)", "the path of a plan's JSON file"]),
    ({"plan": {}}, {}, ["plan", "{} (dict)", "name the models"]),
    ({"plan": {"net": 1}}, {}, ["plan", "{'net': 1} (dict)", "a dict of such paths"]),
    ({}, {"OPENSMP_PLAN": "{net: 1}"}, ["plan (OPENSMP_PLAN)", "it is not JSON"]),
    (
        {"plan": "a.json", "auto_partition": False, "default_partition": 0},
        {},
        ["plan (smp.init dict): received 'a.json'", "auto_partition is False"],
    ),
    ({}, {"OPENSMP_PARTITIONS": "two"}, ["(OPENSMP_PARTITIONS)", "'two' (str)", "integer >= 1"]),
    ({}, {"OPENSMP_PARTITIONS": "0"}, ["(OPENSMP_PARTITIONS)", "'0' (str)", "integer >= 1"]),
    ({}, {"OPENSMP_AUTO_PARTITION": "maybe"}, ["(OPENSMP_AUTO_PARTITION)", "True or False"]),
    (
        {},
        {"OPENSMP_PARTITONS": "2"},
        ["partitons (OPENSMP_PARTITONS)", "did you mean 'partitions'?"],
    ),
    (
        {"partitions": 2},
        {"OPENSMP_PARTITIONS": "many"},
        ["(OPENSMP_PARTITIONS)", "'many' (str)"],
    ),
    (
        {},
        {"SM_HP_MP_PARAMETERS": "{broken"},
        ["SM_HP_MP_PARAMETERS", "not JSON", "line 1, column 2"],
    ),
    ({}, {"SM_HP_MP_PARAMETERS": "[1, 2]"}, ["SM_HP_MP_PARAMETERS", "(list)", "a JSON object"]),
    (
        {},
        {"SM_HP_MP_PARAMETERS": '{"partitions": "x"}'},
        ["partitions (SM_HP_MP_PARAMETERS)", "'x' (str)", "an integer >= 1"],
    ),
    (
        {},
        {"SM_HP_MP_PARAMETERS": '{"partitions": 2.5}'},
        ["partitions (SM_HP_MP_PARAMETERS)", "2.5 (float)", "an integer >= 1"],
    ),
    (
        {},
        {"SM_HP_MP_PARAMETERS": '{"partition": 2}'},
        ["partition (SM_HP_MP_PARAMETERS)", "unknown", "did you mean 'partitions'?"],
    ),
]


@pytest.mark.parametrize(
    ("explicit", "environ", "parts"), MISUSES, ids=lambda value: str(value)[:60]
)
def test_misuse_gets_one_fault_that_says(explicit, environ, parts):
    faults = faults_of(explicit, environ=environ)
    assert len(faults) == 1
    for part in parts:
        assert part in faults[0]


def test_fault_of_a_flag_names_the_flag():
    (fault,) = faults_of({}, flags={"microbatches": "4"})
    assert fault.startswith("microbatches (flag): received '4' (str)")


def test_faults_of_all_sources_come_at_once():
    faults = faults_of(
        {"partitions": 0, "pipline": "simple", "microbatches": 4, "active_microbatches": 2},
        flags={"optimize": "size"},
        environ={
            "OPENSMP_HOROVOD": "perhaps",
            "OPENSMP_PIPELINE": "simple",
            "SM_HP_MP_PARAMETERS": "null",
        },
    )
    starts = [
        "SM_HP_MP_PARAMETERS: received None",
        "pipline (smp.init dict)",
        "partitions (smp.init dict)",
        "optimize (flag)",
        "horovod (OPENSMP_HOROVOD)",
        "active_microbatches (smp.init dict): received 2 (int), but pipeline is 'simple'",
    ]
    assert len(faults) == len(starts)
    for fault, start in zip(faults, starts, strict=True):
        assert fault.startswith(start)


def test_faulty_value_causes_no_second_fault():
    faults = faults_of({"partitions": "3", "default_partition": 2, "devices": ["CPU:0"]})
    assert len(faults) == 1


def test_long_value_is_shortened_in_the_message():
    (fault,) = faults_of({"pipeline": "x" * 1000})
    assert len(fault) < 350


def test_config_error_is_a_value_error_of_the_package():
    assert issubclass(ConfigError, SmpError)
    assert issubclass(ConfigError, ValueError)


# ---------------------------------------------------------------------------- several processes


def test_processes_per_replica_is_automatic_unless_given():
    assert Config.resolve({"partitions": 4}).processes_per_replica is None
    environ = {"OPENSMP_PROCESSES_PER_REPLICA": "2"}
    assert Config.resolve({"partitions": 4}, environ=environ).processes_per_replica == 2


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (
            3,
            "every process owns the same number of them; accepted: 1, 2, 4",
        ),
        (0, "accepted: an integer >= 1 and <= 100000, or None to choose automatically"),
        ("two", "accepted: an integer >= 1 and <= 100000, or None"),
    ],
)
def test_processes_per_replica_must_divide_the_partitions(value, part):
    with pytest.raises(ConfigError) as caught:
        Config.resolve({"partitions": 4, "processes_per_replica": value})
    assert part in str(caught.value)


def test_variables_of_the_launcher_are_no_keys():
    assert Config.resolve(environ={"OPENSMP_RUN_RANK": "1"}) == Config(partitions=1)


def own_order(graph: object) -> list[list[str]]:
    return []


@pytest.mark.parametrize("pipeline", ["mine.json", Path("folder/mine.json"), own_order])
def test_pipeline_may_be_a_file_or_a_function(pipeline):
    config = Config.resolve({"pipeline": pipeline})
    assert config.pipeline == (str(pipeline) if isinstance(pipeline, Path) else pipeline)
    assert Config.resolve(config.to_dict()) == config


@pytest.mark.parametrize("pipeline", ["mine.txt", "a\0.json", TypeError, b"mine.json", ["simple"]])
def test_pipeline_may_be_nothing_else(pipeline):
    with pytest.raises(ConfigError, match=r"file that ends with '\.json', or a function"):
        Config.resolve({"pipeline": pipeline})


@pytest.mark.parametrize("pipeline", sorted(n for n, row in PIPELINES.items() if row.pieces))
def test_schedule_that_is_for_a_number_of_pieces_refuses_others(pipeline):
    wanted = PIPELINES[pipeline].pieces
    for pieces in (1, wanted):
        config = Config.resolve({"pipeline": pipeline, "pieces_per_partition": pieces})
        assert Config.resolve(config.to_dict()) == config
    with pytest.raises(ConfigError, match=rf"which is for {wanted} pieces? a partition; accepted:"):
        Config.resolve({"pipeline": pipeline, "pieces_per_partition": 3})


def test_known_keys_are_listed_once_however_many_are_unknown():
    with pytest.raises(ConfigError) as error:
        Config.resolve({"xyzzy": 1, **{f"key{number}": number for number in range(20_000)}})
    text = str(error.value)
    assert text.count("known keys: partitions, ") == 1
    assert (
        "key3 (smp.init dict): received 3 (int); this key is unknown; known keys: see above" in text
    )
    assert len(text) < 10_000
