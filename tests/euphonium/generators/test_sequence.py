"""Which samples ranks can share, and what is said of those that they cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
from torch.distributed import _functional_collectives as collectives

from euphonium.config import LearnerPoolConfig, RunConfig
from euphonium.errors import ConfigError, TrainingError
from euphonium.generators.sequence import check_sequence_parallel, ranks_that_share
from learners.engine.sequence import replicas
from orchestrator.commands.launch import preflight
from tests.euphonium.generators.cases import TRANSFORMERS, family_of
from tests.euphonium.generators.tiny_pipelines import Folders

# Their losses and gradients are compared with those of ranks that share nothing; SkyReels' network is HunyuanVideo's.
SHARING = {
    "FluxPipeline", "WanPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_can_share_says_so(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    # All have two heads, and even numbers of tokens.
    assert ranks_that_share(family) == ([2] if family.pipeline_class in SHARING and "a14b" not in name else [])
    check_sequence_parallel(family, 1)
    if ranks_that_share(family):
        check_sequence_parallel(family, 2)


@pytest.mark.parametrize(
    ("name", "changes", "ranks", "message"),
    [
        ("sd3", {}, 2, "tokens of a StableDiffusion3Pipeline cannot be shared; set it to 1"),
        ("wan", {}, 4, "4 ranks cannot share 2 heads and 96 tokens of a sample evenly; 2 can"),
        ("wan", {"frames": 1, "height": 12, "width": 12}, 2, "2 heads and 9 tokens of a sample evenly; no number can"),
        ("flux", {"max_prompt_tokens": 15}, 2, r"and 15 of a prompt \(model.max_prompt_tokens\) evenly; no number can"),
        ("wan", {"attention_backend": "flex"}, 2, r"model\.attention_backend: flex .* take one of .*native"),
    ],
)
def test_what_cannot_share_is_refused(
    name: str, changes: dict[str, object], ranks: int, message: str, folders: Folders
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sequence_parallel(family_of(name, folders, **changes), ranks)


def test_the_hunyuan_models_exchange_tokens_with_any_backend(folders: Folders) -> None:
    check_sequence_parallel(family_of("hunyuan", folders, attention_backend="flex"), 2)


def test_every_rank_shares() -> None:
    assert LearnerPoolConfig(num_workers=8, sequence_parallel=4).sequence_parallel == 4
    with pytest.raises(ValueError, match=r"4 ranks share a sample, and num_workers .6. is no multiple of it; set .* 8"):
        LearnerPoolConfig(num_workers=6, sequence_parallel=4)
    assert replicas(8, 4) == 2
    with pytest.raises(TrainingError, match=r"6 ranks, no multiple of pools\.learner\.sequence_parallel .4."):
        replicas(6, 4)


def test_it_is_checked_before_anything_starts(make_config: Callable[..., RunConfig]) -> None:
    shared = "pools.learner.num_workers=4", "pools.learner.sequence_parallel=4"
    plan = preflight(make_config(*shared))
    assert plan["learner ranks"] == "4 x 0 GPU, of which 4 share every sample's tokens"
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 heads"):
        preflight(make_config("pools.learner.num_workers=3", "pools.learner.sequence_parallel=3"))


def test_attention_takes_what_an_older_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(collectives, "all_gather_single_autograd")
    spec = importlib.util.find_spec("euphonium.generators.attention")
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.all_gather_single_autograd is collectives.all_gather_tensor_autograd
