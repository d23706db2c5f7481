"""What the study compares."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.runs import Method

# Same samples and evaluations for all methods. On seed 11, which no table has, learning rates of 3e-4, 5e-4 and 1e-3
# were tried for ours with and without process reward, and 3e-4, 5e-4 and an eta of 0.3 and 1 for DanceGRPO; the recipes
# have the best. The others were not searched.
COMMON = (
    "rollout.prompts_per_iteration=12", "rollout.group_size=8", "evaluation.every=2", "evaluation.samples_per_prompt=2",
)  # fmt: skip
QUICK = (
    "iterations=2", "rollout.prompts_per_iteration=4", "evaluation.every=1", "evaluation.prompts=8",
    "evaluation.samples_per_prompt=1",
)  # fmt: skip
UNGUIDED = ("sampler.guidance=null", "rewards.process=null", "advantage.baseline=group")


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


DANCE, OURS = Method("DanceGRPO", "dancegrpo.yaml"), Method("ours", "euphonium-sage.yaml")
PLANS = {
    "convergence": Plan(
        "Held-out reward by iteration",
        DANCE.name,
        (
            DANCE,
            Method("Euphonium", "euphonium.yaml"),
            Method("ours without process reward", "euphonium-sage.yaml", UNGUIDED),
            OURS,
            Method("Flow-GRPO", "flow-grpo.yaml"),
            Method("CPS", "cps.yaml"),
            Method("MixGRPO", "mixgrpo.yaml"),
            Method("SAGE-GRPO", "sage-grpo-a.yaml"),
            Method("DiffusionNFT", "nft.yaml"),
            Method("Diffusion-DPO", "dpo.yaml"),
        ),
    ),
    "guidance": Plan(
        "What is learnt from guided samples",
        "ours without process reward",
        (
            Method("ours without process reward", "euphonium-sage.yaml", UNGUIDED),
            OURS,
            Method("without control", "euphonium-sage.yaml", ("sampler.guidance.control=null",)),
            Method("compared with the whole group", "euphonium-sage.yaml", ("advantage.baseline=group",)),
            Method("compared with members guided alike", "euphonium-sage.yaml", ("advantage.baseline=strength",)),
            Method(
                "every member guided",
                "euphonium-sage.yaml",
                ("advantage.baseline=group", "sampler.guidance.control=null", "sampler.guidance.strengths=[1]"),
            ),
            Method("and the guided mean imitated", "euphonium-sage.yaml", ("objective.imitate_guidance=0.5",)),
            Method(
                "and process reward by progress",
                "euphonium-sage.yaml",
                ("advantage.mode=both", "rewards.process.weight=0.5", "rewards.process.credit=progress"),
            ),
        ),
    ),
}
