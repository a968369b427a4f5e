"""Keys of other libraries that scripts pass on: accepted where they ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """A key that opensmp does not have.

    Attributes:
        neutral: The values with which it asks for nothing.
        instead: What to use in place of the others.
    """

    neutral: tuple[Any, ...]
    instead: str


_PRECISION = (
    "the precision is that of the layers; use keras.config.set_dtype_policy, such as "
    '"mixed_float16" or "mixed_bfloat16"'
)
_REPLICAS = "start more processes than partitions: each group of them is a replica"

FOREIGN_KEYS: Mapping[str, Foreign] = {
    "activation_loading_horizon": Foreign((4,), "what is offloaded is read one pass ahead"),
    "bf16": Foreign((False,), _PRECISION),
    "ddp": Foreign((False,), f"replicas need no key; {_REPLICAS}"),
    "ddp_dist_backend": Foreign(("auto",), 'use "transport"'),
    "ddp_port": Foreign((None,), "replicas use the connections that all processes have"),
    "delayed_parameter_initialization": Foreign(
        (False, True), "variables always get their memory in their partition"
    ),
    "deterministic_server": Foreign((False,), "the order of passes is always the same"),
    "fp16": Foreign((False,), _PRECISION),
    "fp16_params": Foreign((False,), _PRECISION),
    "memory_weight": Foreign((0.2, 0.8), 'use "optimize": "memory" or "speed"'),
    "offload_activations": Foreign((False,), 'use "offload": "residuals"'),
    "prescaled_batch": Foreign((False,), "give each replica its own batch"),
    "sharded_data_parallel_degree": Foreign((1,), 'use "shard_optimizer_state": True'),
    "skip_tracing": Foreign((False,), "models are traced to be split"),
    "tensor_parallel_degree": Foreign(
        (1,), 'layers are not split over devices, only the model is; use "partitions"'
    ),
}
"""Keys of the vendor's library for other frameworks, by name."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether a foreign key asks for nothing with this value, which may be text."""
    return any(_plain(value) == _plain(neutral) for neutral in FOREIGN_KEYS[name].neutral)


def fault(name: str) -> str:
    """What to say about another value."""
    neutral, instead = FOREIGN_KEYS[name]
    accepted = " or ".join(map(repr, neutral))
    return f"opensmp does not have this key; accepted: {accepted}, which changes nothing; {instead}"


def _plain(value: Any) -> str:
    try:
        return str(value).strip().lower()
    except Exception:  # whatever a script has put there
        return ""
