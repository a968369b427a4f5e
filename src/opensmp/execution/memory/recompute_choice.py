"""What a step recomputes: the policy of each microbatch, and whether its layers are known."""

from __future__ import annotations

from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import Choice
from opensmp.compiler.recomputation.policy import Policy, describe_unmatched, is_match
from opensmp.config import Config
from opensmp.config.recompute import AUTO, NONE
from opensmp.errors import ConfigError
from opensmp.execution.models.registry import layer_names

_NO_LIMIT = (
    "recompute: 'auto' recomputes in the partitions of model '{model}' that would not fit the "
    "memory otherwise, but its plan has no memory limit. Expected: a plan file that was made with "
    "one, by `opensmp plan ... --device-memory 16GiB --recompute auto --output plan.json`, and is "
    "given as 'plan' to smp.init. Or choose 'selective' or 'full'."
)


class RecomputeChoice:
    """Chooses what the programs of a step recompute.

    Args:
        config: The configuration.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._policy = Policy.of(config.recompute)
        self._labels: dict[str, None] = {}
        self._chosen: dict[int, tuple[Plan, tuple[Choice, ...]]] = {}

    def policy(self, plan: Plan, microbatch: int) -> Policy:
        """Returns the policy for one microbatch of a model.

        Raises:
            ConfigError: The policy is `"auto"`, but the plan has no memory limit.
        """
        if self._config.recompute != AUTO:
            return self._policy
        if plan.settings.machine.memory_bytes is None:
            raise ConfigError(_NO_LIMIT.format(model=plan.model))
        if id(plan) not in self._chosen:
            self._chosen[id(plan)] = plan, plan.prediction.recompute
        settings, number = plan.settings, plan.num_partitions
        levels = (
            choice.level_of(microbatch, settings.microbatches_in_memory(number, partition))
            for partition, choice in enumerate(self._chosen[id(plan)][1])
        )
        return Policy(NONE, tuple(enumerate(levels)))

    def noted(self, program: Program) -> Program:
        """Records the layers of a model of the step, and returns it."""
        if self._policy.layers:
            self._labels.update(dict.fromkeys(program.layer_labels))
        return program

    def check(self) -> None:
        """Raises if a pattern names no layer of the step, nor of any other model.

        Raises:
            ConfigError: Such a pattern is in the configuration.
        """
        unmatched = self._policy.unmatched(self._labels) if self._labels else ()
        if not unmatched:
            return
        elsewhere = layer_names()
        unmatched = tuple(
            pattern
            for pattern in unmatched
            if not any(is_match(pattern.rpartition("/")[2], name) for name in elsewhere)
        )
        if unmatched:
            raise ConfigError(describe_unmatched(unmatched, self._labels))
