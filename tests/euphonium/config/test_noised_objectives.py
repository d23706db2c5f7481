"""What a recipe may say with an objective of noised samples, and with the sampler without noise."""

from pathlib import Path

import pytest

from euphonium.config import load_config
from tests.euphonium.config.minimal import failure

ODE = ("sampler.law=ode", "sampler.eta=null", "sampler.shared_noise=false")
NFT = (*ODE, "objective.kind=nft")
DPO = (*ODE, "objective.kind=dpo", "advantage.best_of=1", "objective.kl.anchor=fixed")
PROCESS = "rewards.process.path=prm"


@pytest.mark.parametrize("law", ["dance", "sage", "cps"])
@pytest.mark.parametrize("kind", [NFT, DPO], ids=["nft", "dpo"])
def test_any_sampler_may_draw_the_samples(recipe: Path, kind: tuple[str, ...], law: str) -> None:
    assert load_config(recipe, kind).sampler.eta is None
    config = load_config(recipe, (*kind, f"sampler.law={law}", "sampler.eta=0.3", "sampler.shared_noise=true"))
    assert config.objective.noises_samples


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (ODE, "objective.kind: distill"),
        ((*NFT, "sampler.eta=0.3"), "leave out eta and sde_window"),
        ((*NFT, "sampler.sde_window=[0,4]"), "leave out eta and sde_window"),
        ((*NFT, "sampler.shared_noise=true"), "set shared_noise: false"),
        (("sampler.eta=null",), "eta is missing: it is the noise level of law: dance"),
        (("objective.nft.mixture=0.5",), "the fields of nft are for kind: nft"),
        ((*NFT, "objective.clip_range=0.1"), "leave out clip_range"),
        ((*NFT, "objective.step_weights=equaliser", "objective.ratio_normalisation=true"),
         "leave out step_weights, ratio_normalisation"),
        ((*NFT, "objective.old_log_probs=rollout"), "leave out old_log_probs"),
        ((*NFT, "objective.imitate_guidance=1"), "leave out imitate_guidance"),
        ((*NFT, "objective.kl.previous=k3"), "take kl.anchor"),
        ((*NFT, PROCESS), "set advantage.mode: outcome, or rewards.process.weight: 0"),
        ((*NFT, "objective.updates_per_iteration=2", "rollout.max_staleness=1"), "only with one update an iteration"),
        ((*NFT, "objective.trained_steps=[0,9]"), "objective.trained_steps ends after the last of 8 steps"),
        ((*DPO[:-1],), "give kl.anchor"),
        ((*DPO, "objective.kl.weight=0"), "a kl.weight above 0"),
        ((*DPO, "advantage.best_of=2"), "advantage.best_of: 1"),
        ((*DPO, "advantage.best_of=null"), "advantage.best_of: 1"),
        ((*DPO, "pools.learner.rows_per_micro_batch=3"), "take an even number"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_by_name(recipe: Path, overrides: tuple[str, ...], named: str) -> None:
    assert named in failure(recipe, *overrides)


def test_a_process_reward_may_guide_or_be_reported(recipe: Path) -> None:
    guided = (*NFT, "sampler.guidance.scale=0.1", PROCESS)
    assert load_config(recipe, (*guided, "rewards.process.weight=0")).sampler.guidance is not None
    assert load_config(recipe, (*guided, "advantage.mode=outcome")).rewards.process is not None


def test_what_is_kept_and_computed_besides_the_policy(recipe: Path) -> None:
    one = load_config(recipe, (*NFT, "rollout.max_staleness=1")).objective
    assert not one.needs_previous_policy
    assert not one.trains_zero_advantages, "at the old policy a sample that is neither good nor bad has no gradient"
    two = load_config(recipe, (*NFT, "objective.updates_per_iteration=2")).objective
    assert two.needs_previous_policy
    assert two.trains_zero_advantages
    for means in ("ratio_normalisation=true", "kl={previous: gaussian}"):
        for updates in (1, 2):
            kept = load_config(recipe, (f"objective.{means}", f"objective.updates_per_iteration={updates}")).objective
            assert kept.needs_previous_policy == (updates == 2)
    pairs = load_config(recipe, (*DPO, "objective.updates_per_iteration=2")).objective
    assert not pairs.needs_previous_policy
    assert pairs.trains_zero_advantages, "or a pair would lose the member whose advantage is 0"
