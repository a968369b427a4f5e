"""The options of `opensmp plan` besides those of the configuration's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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
            help="Try other numbers of partitions and microbatches and both schedules, and "
            "plan for the best.",
        ),
    ] = False
