"""What the study compares."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.runs import Method

# The same samples and evaluations for all methods.
COMMON = ("rollout.prompts_per_iteration=12", "rollout.group_size=8", "evaluation.every=2")
QUICK = (
    "iterations=2", "rollout.prompts_per_iteration=4", "evaluation.every=1", "evaluation.prompts=8",
    "evaluation.samples_per_prompt=1",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A table.

    Attributes:
        title: above it.
        reference: name of the method whose best value the others' speed is measured by.
        methods: its rows.
    """

    title: str
    reference: str
    methods: tuple[Method, ...]


PLANS = {
    "convergence": Plan(
        "Held-out reward by iteration",
        "DanceGRPO",
        (
            Method("DanceGRPO", "dancegrpo.yaml"),
            Method("Flow-GRPO", "flow-grpo.yaml"),
            Method("CPS", "cps.yaml"),
            Method("MixGRPO", "mixgrpo.yaml"),
            Method("SAGE-GRPO", "sage-grpo-a.yaml"),
            Method("Euphonium", "euphonium.yaml"),
            Method("ours", "euphonium-sage.yaml"),
            Method(
                "ours without process reward", "euphonium-sage.yaml", ("sampler.guidance=null", "rewards.process=null")
            ),
        ),
    ),
}
