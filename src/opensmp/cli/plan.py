"""`opensmp plan`: the command and its options.

What it does is in `planning`, which imports TensorFlow: help needs no more than this.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from opensmp.base.requirements import require_tensorflow
from opensmp.cli.options import command, key_option
from opensmp.config import Config
from opensmp.config.keys import KEYS
from opensmp.errors import PlanError

_MOST_BATCH = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is given on the command line of `opensmp plan`.

    Attributes:
        flags: The keys of the configuration that were given or have a default.
    """

    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function that returns a Keras model, or a class that is one: "
            "keras.applications:ResNet50, my_models:build, path/to/file.py:build.",
        ),
    ]
    batch: Annotated[int, typer.Option(min=1, max=_MOST_BATCH, help="Examples per step.")]
    flags: Mapping[str, Any]
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of one device, such as 16GiB or 16GB.")
    ] = None
    device_flops: Annotated[
        float | None, typer.Option(help="Speed of one device in FLOPs per second: 1e13.")
    ] = None
    device_bandwidth: Annotated[
        str | None, typer.Option(help="Memory bandwidth of one device per second: 900GB.")
    ] = None
    link_bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth between devices per second: 25GB.")
    ] = None
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure the speed of this machine's device, and run each piece of the model on "
            "it, in place of the estimates. Takes seconds to minutes, once for a model.",
        ),
    ] = False
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[/DTYPE]",
            help="What one example looks like: 224x224x3, token_ids=128/int32. Needed where "
            "the model does not know.",
        ),
    ] = None
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the factory: weights=null."),
    ] = None
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Give variables their memory while planning.")
    ] = False
    output: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None
    picture: Annotated[
        Path | None, typer.Option(help="Draw the plan here: .svg, .png or .pdf.")
    ] = None
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, and what other cuts would cost.")
    ] = False
    recommend: Annotated[
        bool,
        typer.Option(
            "--recommend",
            help="Try other numbers of partitions and microbatches and several schedules, and "
            "plan for the best.",
        ),
    ] = False


_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "partitions": {
        "default": inspect.Parameter.empty,
        "bounded": True,
        "help": "Number of partitions; with --recommend, of devices.",
    },
    "microbatches": {"default": Config.microbatches, "bounded": True},
    "pipeline": {"names": ("--pipeline", "--schedule"), "default": Config.pipeline},
    "active_microbatches": {"bounded": True},
    "optimize": {"show_default": "memory; with --recommend, speed"},
    "contiguous": {"default": Config.contiguous},
    "pieces_per_partition": {"default": Config.pieces_per_partition, "bounded": True},
    "recompute": {"show_default": "none"},
    "offload": {"show_default": "none"},
    "device": {"show_default": "a CPU without limit of memory"},
}
"""Keys that a plan depends on, with what their options have besides those of `opensmp run`."""

REFUSED: Mapping[str, str] = {
    "auto_partition": "this command is automatic partitioning; leave it out",
    "plan": "this command makes plans, and uses none; print one by Plan.load(path) in Python",
}
"""Keys whose options have one possible value here, and what to do instead of another."""

_CARRIED = " A plan does not depend on it; it goes into the call of smp.init that is printed."


def _option(key: str) -> inspect.Parameter:
    given = dict(_OPTIONS.get(key, {}))
    names = given.pop("names", ())
    if key not in _OPTIONS:
        given["help"] = KEYS[key].help + ("" if key in REFUSED else _CARRIED)
    return key_option(key, *names, **given)


KEY_OPTIONS = tuple(_option(key) for key in (*_OPTIONS, *(k for k in KEYS if k not in _OPTIONS)))
"""All keys of the configuration, those that a plan depends on first."""

CARRIED = tuple(key for key in KEYS if key not in _OPTIONS and key not in REFUSED)
"""Keys that a plan does not depend on: they are checked, and printed with how to use the plan."""


@command(PlanOptions, KEY_OPTIONS)
def plan(options: PlanOptions) -> None:
    """Cuts a model into partitions and predicts time and memory of a training step.

    Nothing is run and nothing is allocated, unless --measure is given: a model that no machine
    at hand could hold is planned as well.
    """
    try:
        require_tensorflow()
    except ImportError as error:
        raise PlanError(f"opensmp plan: {error}") from error
    from opensmp.cli.planning import make_plan

    make_plan(options)
