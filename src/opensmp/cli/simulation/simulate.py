"""`opensmp simulate`: the command and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from opensmp.base.requirements import require_tensorflow
from opensmp.cli.options import command, key_option
from opensmp.config import Config
from opensmp.errors import PlanError

_MOST = 1_000_000_000


def _number(help: str, **limits: Any) -> Any:
    return typer.Option(min=1, max=_MOST, help=help, **limits)


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What is given on the command line of `opensmp simulate`.

    Attributes:
        flags: The keys of the configuration that were given or have a default.
    """

    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FACTORY]",
            help="A function that returns a Keras model, or a class that is one; without it, "
            "--model or the numbers of a Transformer.",
        ),
    ] = None
    batch: Annotated[int, _number("Examples of a step, of all replicas.")]
    nodes: Annotated[int, _number("Machines of the cluster.")] = 1
    devices_per_node: Annotated[int, _number("Devices of each machine.")] = 8
    flags: Mapping[str, Any]
    within: Annotated[
        str | None,
        typer.Option(
            help="Link within a machine: nvlink4, pcie5 and others, or 25GB per second; by default "
            "that of the device."
        ),
    ] = None
    between: Annotated[
        str,
        typer.Option(
            help="Link of a device to other machines: infiniband-ndr, ethernet-100, 25GB."
        ),
    ] = "infiniband-hdr"
    host: Annotated[
        str, typer.Option(help="Link of a device to the memory of its machine, for --offload.")
    ] = "pcie4"
    replicas: Annotated[int, _number("Copies of the model.")] = 1
    overlap_all_reduce: Annotated[
        bool,
        typer.Option(
            "--overlap-all-reduce",
            help="Sum up gradients during the last backward pass, which this library does not.",
        ),
    ] = False
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Look for the fastest partitions, replicas, microbatches, pieces, schedule and "
            "recomputation that fit; only for Transformers.",
        ),
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    model: Annotated[
        str | None,
        typer.Option(help="A known Transformer: llama3-405b, llama3-70b, llama3-8b, gpt3-175b."),
    ] = None
    layers: Annotated[int | None, _number("Of a Transformer: its layers.")] = None
    width: Annotated[int | None, _number("The size of its hidden states.")] = None
    heads: Annotated[int | None, _number("Its attention heads.")] = None
    sequence: Annotated[int | None, _number("Tokens of an example.")] = None
    vocabulary: Annotated[int | None, _number("The size of its vocabulary.")] = None
    key_value_heads: Annotated[int | None, _number("Its heads of keys and values.")] = None
    mlp_width: Annotated[int | None, _number("The inner size of its MLP; 4 times width.")] = None
    gated: Annotated[bool, typer.Option("--gated", help="Its MLP is gated, as SwiGLU.")] = False
    precision: Annotated[
        str | None, typer.Option(help="Dtype of its products: bfloat16, float16 or float32.")
    ] = None
    tensor_parallel: Annotated[
        int,
        _number("Devices that share each partition: to describe runs of other systems only."),
    ] = 1
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[/DTYPE]",
            help="What one example of a Keras model looks like: 224x224x3, token_ids=128/int32.",
        ),
    ] = None
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the factory: weights=null."),
    ] = None


SIMULATED_KEYS = (
    key_option("partitions", default=1, bounded=True, show_default="1"),
    key_option("microbatches", default=Config.microbatches, bounded=True),
    key_option("pipeline", "--pipeline", "--schedule", default=Config.pipeline),
    key_option("pieces_per_partition", default=Config.pieces_per_partition, bounded=True),
    key_option("active_microbatches", bounded=True),
    key_option("recompute", show_default="none"),
    key_option("offload", show_default="none"),
    key_option("shard_optimizer_state", default=Config.shard_optimizer_state),
    key_option("placement_strategy", default=Config.placement_strategy),
    key_option("device", help="The devices of the cluster: h100, a100, or their numbers."),
)
"""The keys of the configuration that a simulation depends on."""


@command(SimulateOptions, SIMULATED_KEYS)
def simulate(options: SimulateOptions) -> None:
    """Predicts a training step on a cluster that need not be at hand.

    Prints the time of a step, its bubble, the memory of each device, and what bounds it; with
    --search, for the fastest way to run it. The exit code is 1 if it does not fit.
    """
    if options.target is not None:
        try:
            require_tensorflow()
        except ImportError as error:
            raise PlanError(f"opensmp simulate: {error}") from error
        from opensmp.cli.simulation.keras_models import simulate_keras

        simulate_keras(options)
        return
    from opensmp.cli.simulation.transformers import simulate_described

    simulate_described(options)
