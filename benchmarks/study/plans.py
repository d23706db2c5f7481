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


def ours(name: str, *overrides: str) -> Method:
    """A row that is ours but for these settings."""
    return Method(name, OURS.recipe, overrides)


def process_advantage(credit: str) -> tuple[str, ...]:
    """Settings with which the process reward is learnt from, too."""
    return "advantage.mode=both", "rewards.process.weight=0.5", f"rewards.process.credit={credit}"


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
            ours("ours with process advantage by progress", *process_advantage("progress")),
            Method("DiffusionNFT", "nft.yaml"),
            Method("Diffusion-DPO", "dpo.yaml"),
        ),
    ),
    "ablations": Plan(
        "What each part of the guided recipe is worth",
        "no guidance",
        (
            ours("no guidance", *UNGUIDED),
            OURS,
            # The Euphonium paper's Table 3. Ours has no process advantage: with one, its own rows.
            ours("and process advantage of states", *process_advantage("state")),
            ours("and process advantage of next states", *process_advantage("next_state")),
            ours("and process advantage by progress", *process_advantage("progress")),
            ours("process advantage by progress alone", *process_advantage("progress"), "advantage.mode=process"),
            ours(
                "process advantage by progress, no guidance",
                *process_advantage("progress"),
                "sampler.guidance=null",
                "advantage.baseline=group",
            ),
            # Table 4: a strength of 0.12 of the step's noise is the recipe's.
            *(ours(f"strength {scale}", f"sampler.guidance.scale={scale}") for scale in (0.012, 0.04, 0.4, 1.2)),
            # Table 5: of four trained steps the recipe guides the later two.
            ours("steps 0 to 4 guided", "sampler.guidance.window=[0,4]"),
            ours("steps 0 to 2 guided", "sampler.guidance.window=[0,2]"),
            ours("steps 3 to 4 guided", "sampler.guidance.window=[3,4]"),
            # Table 6: what the ratio is of.
            ours("guided mean in the ratio", "objective.kind=standard"),
            ours("guided mean imitated", "objective.imitate_guidance=0.5"),
            # Whom guided members are compared with, and how many they are.
            ours("compared with the whole group", "advantage.baseline=group"),
            ours("compared with members guided alike", "advantage.baseline=strength"),
            ours("a quarter guided", "sampler.guidance.strengths=[0,0,0,1]"),
            ours("three quarters guided", "sampler.guidance.strengths=[0,1,1,1]"),
            ours(
                "all guided",
                "advantage.baseline=group",
                "sampler.guidance.control=null",
                "sampler.guidance.strengths=[1]",
            ),
            # What ends it.
            ours("without control", "sampler.guidance.control=null"),
            ours("never ended", "sampler.guidance.until=null"),
            # SAGE-GRPO's parts.
            ours("without equaliser", "objective.step_weights=uniform"),
            ours("without KL penalty", "objective.kl=null"),
        ),
    ),
    "staleness": Plan(
        "Groups drawn by an earlier policy",
        OURS.name,
        (OURS, *(ours(f"{lag} iterations stale", f"rollout.max_staleness={lag}") for lag in (1, 2, 4))),
    ),
}
