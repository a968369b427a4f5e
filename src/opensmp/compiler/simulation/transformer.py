"""A Transformer by its numbers, as tables of papers describe it, without a Keras model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from opensmp.base.message_text import did_you_mean, shown
from opensmp.config.kinds import is_count
from opensmp.errors import PlanError

_MOST = 10**9
_PRECISIONS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Transformer:
    """A decoder-only Transformer with equal layers.

    Attributes:
        layers: Number of layers, >= 1.
        width: Size of the hidden states.
        heads: Attention heads of each layer.
        sequence: Tokens of each example.
        vocabulary: Size of the vocabulary.
        key_value_heads: Heads of keys and values; None for as many as `heads`.
        mlp_width: Inner size of the MLP; None for 4 times `width`.
        gated: Whether the MLP has a third matrix, as in SwiGLU.
        fused_attention: Whether attention scores are never in memory, as in FlashAttention.
        dropout: Whether masks of dropout are kept for the backward pass.
        precision: Dtype of the computation, `"bfloat16"`, `"float16"` or `"float32"`; weights,
            gradients and the optimizer's state are float32.

    Raises:
        PlanError: If a value is invalid; the message lists all faults.

    Example:
        >>> model = Transformer(96, 12288, 96, sequence=2048, vocabulary=51200)
        >>> round(model.parameters / 1e9, 1)
        175.2
    """

    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    key_value_heads: int | None = None
    mlp_width: int | None = None
    gated: bool = False
    fused_attention: bool = True
    dropout: bool = False
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        faults = [
            f"{name} is an integer from 1 to {_MOST}; received {shown(value)}"
            for name in ("layers", "width", "heads", "sequence", "vocabulary")
            for value in [getattr(self, name)]
            if not is_count(value, _MOST)
        ]
        faults += [
            f"{name} is an integer from 1 to {_MOST}, or None; received {shown(value)}"
            for name in ("key_value_heads", "mlp_width")
            for value in [getattr(self, name)]
            if value is not None and not is_count(value, _MOST)
        ]
        if not faults and self.width % self.heads:
            faults.append(f"heads={self.heads} must divide width={self.width}")
        if not faults and self.heads % (self.key_value_heads or self.heads):
            faults.append(f"key_value_heads={self.key_value_heads} must divide heads={self.heads}")
        if self.precision not in _PRECISIONS:
            faults.append(
                f"precision is one of {', '.join(map(repr, _PRECISIONS))}; received "
                f"{shown(self.precision)}"
            )
        if faults:
            raise PlanError(f"Transformer: {'; '.join(faults)}.")

    @property
    def value_bytes(self) -> int:
        """Bytes of a number of the computation."""
        return 4 if self.precision == "float32" else 2

    @property
    def key_width(self) -> int:
        """Size of the keys of all heads, and of the values."""
        return self.width // self.heads * (self.key_value_heads or self.heads)

    @property
    def inner_width(self) -> int:
        """Inner size of the MLP."""
        return self.mlp_width or 4 * self.width

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices and norms of a layer."""
        attention = self.width * (2 * self.width + 2 * self.key_width)
        return attention + (3 if self.gated else 2) * self.width * self.inner_width + 4 * self.width

    @property
    def head_parameters(self) -> int:
        """Numbers in the embedding, and again in the output layer."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All numbers; the embedding and the output layer are counted as one, as papers do."""
        return self.layers * self.layer_parameters + self.head_parameters

    # --- floating-point operations of one example --------------------------------------------

    @property
    def product_flops(self) -> float:
        """Forward FLOPs of the products of a layer with its weights."""
        return 2.0 * self.sequence * (self.layer_parameters - 4 * self.width)

    @property
    def attention_flops(self) -> float:
        """Forward FLOPs of the scores and what they weigh, without use of their causality."""
        return 4.0 * self.sequence**2 * self.width

    @property
    def head_flops(self) -> float:
        """Forward FLOPs of the output layer."""
        return 2.0 * self.sequence * self.head_parameters

    @property
    def step_flops(self) -> float:
        """FLOPs of a step for one example: forward, and twice as many backward."""
        return 3.0 * (self.layers * (self.product_flops + self.attention_flops) + self.head_flops)

    # --- bytes that one example leaves for the backward pass ---------------------------------

    @property
    def shared_bytes(self) -> int:
        """Of a layer: inputs of products, norms, and masks of dropout.

        As in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
        2022 (arXiv 2205.05198), equation 1; tensor parallelism does not divide these.
        """
        norms_and_inputs = 4 * self.width * self.value_bytes
        return self.sequence * (norms_and_inputs + 2 * self.width * self.dropout)

    @property
    def product_bytes(self) -> int:
        """Of a layer: queries, keys, values, and what is inside the MLP."""
        attention = 2 * self.width + 2 * self.key_width
        inner = (3 if self.gated else 2) * self.inner_width
        return self.sequence * (attention + inner) * self.value_bytes

    @property
    def score_bytes(self) -> int:
        """Of a layer: the scores of attention, if they are in memory."""
        if self.fused_attention:
            return 0
        each = 2 * self.value_bytes + 1 if self.dropout else self.value_bytes
        return self.heads * self.sequence**2 * each

    @property
    def boundary_bytes(self) -> int:
        """The hidden states between two layers."""
        return self.sequence * self.width * self.value_bytes

    @property
    def head_bytes(self) -> int:
        """Logits, and their softmax in float32."""
        return self.sequence * self.vocabulary * (self.value_bytes + 4)


_LLAMA: Mapping[str, Any] = {"vocabulary": 128_256, "key_value_heads": 8, "gated": True}

MODELS: Mapping[str, Transformer] = MappingProxyType(
    {
        "gpt3-175b": Transformer(96, 12288, 96, 2048, 51200, dropout=True),
        "llama3-8b": Transformer(32, 4096, 32, 8192, mlp_width=14336, **_LLAMA),
        "llama3-70b": Transformer(80, 8192, 64, 8192, mlp_width=28672, **_LLAMA),
        "llama3-405b": Transformer(126, 16384, 128, 8192, mlp_width=53248, **_LLAMA),
    }
)
"""Known models: GPT-3 (Brown et al., 2020) with a vocabulary that Megatron pads, and Llama 3 (Llama
Team, "The Llama 3 Herd of Models", 2024, table 3)."""


def model_named(name: str) -> Transformer:
    """Returns a known model.

    Raises:
        PlanError: If there is none of this name.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    near = did_you_mean(name, MODELS)
    raise PlanError(
        f"Transformer: there is no known model {shown(name)}; choose one of {', '.join(MODELS)}, "
        f"or give its numbers{'; ' + near if near else '.'}"
    )


def with_sequence(model: Transformer, sequence: int) -> Transformer:
    """Returns the model for examples of another length."""
    return replace(model, sequence=sequence)
