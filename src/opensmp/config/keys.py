"""The keys of the configuration: what each accepts, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from opensmp.config.device import DeviceKind
from opensmp.config.kinds import (
    MOST_MICROBATCHES,
    MOST_PARTITIONS,
    BooleanKind,
    ChoiceKind,
    DevicesKind,
    IntegerKind,
    Kind,
    OptionalIntegerKind,
    PipelineKind,
    PlanKind,
)
from opensmp.config.offload import FolderKind, OffloadKind
from opensmp.config.pipelines import PIPELINES
from opensmp.config.recompute import RecomputeKind


class Key(NamedTuple):
    """One key; its default is that of its field in `Config`.

    Attributes:
        kind: What it accepts.
        help: What it is for, in one sentence of plain text, for the options of commands and for
            the documentation.
        default: The default in words if it depends on other keys; otherwise empty.
    """

    kind: Kind
    help: str
    default: str = ""


_PARTITIONS = IntegerKind(1, MOST_PARTITIONS)
_MICROBATCHES = IntegerKind(1, MOST_MICROBATCHES)

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "partitions": Key(
            _PARTITIONS,
            "Number of partitions of the model.",
            default="one per device",
        ),
        "microbatches": Key(
            _MICROBATCHES,
            "Number of microbatches per step, which must divide the batch size.",
        ),
        "pipeline": Key(
            PipelineKind(tuple(sorted(PIPELINES))),
            "Schedule of a step: "
            + "; ".join(f"{name} {PIPELINES[name].summary}" for name in sorted(PIPELINES))
            + "; a file or a function gives an order of your own.",
        ),
        "optimize": Key(
            ChoiceKind(("memory", "speed")),
            "What automatic partitioning makes small first: memory of the fullest partition, or "
            "time of a step (speed).",
        ),
        "placement_strategy": Key(
            ChoiceKind(("cluster", "spread")),
            "Which ranks form one replica of the model: adjacent ones (cluster), or ranks that are "
            "far apart (spread).",
        ),
        "auto_partition": Key(
            BooleanKind(),
            "Whether partitions are chosen automatically; otherwise smp.partition assigns them.",
        ),
        "default_partition": Key(
            IntegerKind(0, MOST_PARTITIONS - 1),
            "The partition, below partitions, of operations outside every smp.partition.",
        ),
        "contiguous": Key(
            BooleanKind(),
            "Whether automatic partitioning makes each partition one connected piece.",
        ),
        "horovod": Key(
            BooleanKind(),
            "Whether the script makes Horovod-style calls.",
        ),
        "active_microbatches": Key(
            OptionalIntegerKind(_MICROBATCHES),
            "Most microbatches in flight. By default as few, up to partitions + 2, as give the "
            "same predicted step time; all with "
            + " and ".join(name for name, row in PIPELINES.items() if row.holds_all)
            + "; what their orders need with zb_h2 and with a V.",
        ),
        "devices": Key(
            DevicesKind(),
            "Device of each partition: cpu, gpu, or a list such as CPU:0,CPU:1.",
        ),
        "plan": Key(
            PlanKind(),
            "JSON file of a saved plan, to be used instead of a new one.",
        ),
        "processes_per_replica": Key(
            OptionalIntegerKind(_PARTITIONS),
            "Processes that hold one replica of the model; must divide partitions and the number "
            "of processes.",
        ),
        "transport": Key(
            ChoiceKind(("auto", "collective")),
            "How processes exchange tensors: auto uses shared memory within a machine, collective "
            "always the collectives of TensorFlow.",
        ),
        "pieces_per_partition": Key(
            _PARTITIONS,
            "Pieces of the model that automatic partitioning gives to each partition in turn: more "
            "have a smaller bubble and more transfers. The schedules of a V always have two.",
        ),
        "check_finite": Key(
            BooleanKind(),
            "Whether each step checks activations and gradients for values that are nan or "
            "infinite.",
        ),
        "shard_optimizer_state": Key(
            BooleanKind(),
            "Whether each replica of the model keeps only a part of the optimizer's state, updates "
            "the weights of that part, and sends them to the others.",
        ),
        "recompute": Key(
            RecomputeKind(),
            "Which activations the backward pass computes again instead of keeping them: none; "
            "selective, those that are large and cheap; full, all but the inputs of a partition; "
            "auto, as many as the memory limit of the plan asks for.",
        ),
        "offload": Key(
            OffloadKind(),
            "What a partition keeps elsewhere while it does not need it: none; residuals, what "
            "forward passes keep for backward passes; optimizer, the state of optimizers between "
            "updates; all, both.",
        ),
        "offload_folder": Key(
            FolderKind(),
            "Folder on a disk for what partitions on CPUs offload. Those on GPUs offload to the "
            "memory of the host.",
        ),
        "wire_dtype": Key(
            ChoiceKind(("none", "bfloat16", "float16")),
            "Type in which float32 activations and their gradients travel between processes: none, "
            "as they are; bfloat16 or float16, rounded, in half the bytes.",
        ),
        "device": Key(
            DeviceKind(),
            "The device that plans are for: its name, or its numbers. Plans keep to its memory, "
            "and predicted times are its times.",
        ),
    }
)
"""All keys, in the order of the fields of `Config`."""
