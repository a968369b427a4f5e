"""Trace: from a Keras model to one graph whose variables are inputs."""

from __future__ import annotations

from opensmp.graph.spans import LayerSpan
from opensmp.graph.trace import TracedGraph, call_inputs, call_signature, trace
from opensmp.graph.variables import VariableInput

__all__ = ["LayerSpan", "TracedGraph", "VariableInput", "call_inputs", "call_signature", "trace"]
