"""Decorators for functions that make a model or its data: where, with what weights, in batches."""

from __future__ import annotations

from opensmp.decorators.dataset import Batches, distributed_dataset
from opensmp.decorators.pretrained import pretrained_weights
from opensmp.decorators.scope import Scope, scope

__all__ = ["Batches", "Scope", "distributed_dataset", "pretrained_weights", "scope"]
