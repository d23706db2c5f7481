"""ORM servers: decode latents and score the videos, so that rollout actors hold neither a VAE nor a reward model."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from euphonium.config import OrmPoolConfig, OutcomeRewardConfig, RunConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from euphonium.generators.generator import Generator
from euphonium.generators.libraries import import_networks
from euphonium.generators.registry import open_generator
from euphonium.rewards.registry import build_rewards
from euphonium.rewards.shared import Batch
from euphonium.role_logs import keep_role_log
from euphonium.wire.arrays import as_tensor
from euphonium.wire.deadlines import node_id
from euphonium.wire.devices import reserved_device
from euphonium.wire.passes import Passes
from euphonium.wire.records import Array, OrmAnswer, Readiness, Videos
from euphonium.wire.tracing import Tracer
from reward_servers.batching import MicroBatcher

log = logging.getLogger(__name__)

WHAT = "outcome scoring"


@dataclass(frozen=True)
class OrmRequest:
    """Finished samples to score; implements :class:`reward_servers.batching.Request`.

    Attributes:
        latents: float32 ``[samples, *latent]``.
        prompts: one text a sample.
        optional: names of rewards without which the answer is of use: one that fails is left out of it.
    """

    latents: Array
    prompts: Sequence[str]
    optional: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.latents)

    @property
    def label(self) -> str:
        """The first prompt, for errors."""
        return self.prompts[0]

    @property
    def key(self) -> Hashable:
        """Samples share a pass if their latents have the same shape, and the same rewards may be missing."""
        return self.latents.shape[1:], self.optional


class OrmScorer:
    """Decoder and all outcome rewards of a recipe, without Ray."""

    def __init__(
        self,
        rewards: Sequence[OutcomeRewardConfig],
        family: Generator,
        device: torch.device,
        pool: OrmPoolConfig,
    ) -> None:
        """Loads decoder and rewards.

        Args:
            rewards: the recipe's outcome rewards.
            family: the generator whose latents are decoded.
            device: device of the decoder.
            pool: settings: the numbers of samples that are decoded, and scored, at a time.

        Raises:
            ConfigError: a reward cannot be constructed; names it.
        """
        self._decode = family.load_decoder(device)
        self.rewards = build_rewards(rewards)
        self._decoding = Passes(pool.decode_batch, "pools.orm.decode_batch")
        self._scoring = Passes(pool.max_batch, "pools.orm.max_batch")

    def decode(self, latents: Array) -> torch.Tensor:
        """Decodes latents ``[batch, *latent]`` to videos ``[batch, frames, 3, height, width]`` in [0, 1]."""
        states = as_tensor(latents)
        return torch.cat(self._decoding.run(len(states), lambda part: self._decode(states[part])))

    def videos(self, latents: Array) -> Videos:
        """Decodes latents ``[batch, *latent]`` to uint8 ``[batch, frames, height, width, 3]``."""

        def pixels(part: slice) -> Videos:
            decoded = self.decode(latents[part]).permute(0, 1, 3, 4, 2).mul(255).round().to(torch.uint8)
            videos: Videos = decoded.cpu().numpy()
            return videos

        return np.concatenate(self._scoring.run(len(latents), pixels))

    def score(self, latents: Array, prompts: Sequence[str], optional: Sequence[str] = ()) -> OrmAnswer:
        """Scores finished samples.

        Args:
            latents: float32 ``[batch, *latent]``.
            prompts: one a sample.
            optional: as in :class:`OrmRequest`.

        Returns:
            Rewards by name, float32 ``[batch]`` each.

        Raises:
            NonFiniteRewardError: a reward is not finite; names reward and prompt.
            RewardError: a reward failed; names it.
        """
        (answer,) = self.score_requests([OrmRequest(latents, prompts, tuple(optional))])
        if isinstance(answer, RewardError):
            raise answer
        return answer

    def score_requests(self, requests: Sequence[OrmRequest]) -> list[OrmAnswer | RewardError]:
        """Scores requests with equal keys together, ``max_batch`` samples at a time.

        Returns:
            For every request its scores, or an error if they are not finite. Of a request alone, an optional reward
            that failed is missing; of several, it may be one of them that is to blame.

        Raises:
            RewardError: a reward failed on the merged requests, any of which may be to blame.
        """
        latents = np.concatenate([request.latents for request in requests])
        prompts = [prompt for request in requests for prompt in request.prompts]
        # A reward may be left out of the answer to a request that can do without it, but only of that one.
        optional = requests[0].optional if len(requests) == 1 else ()
        parts = self._scoring.run(len(latents), lambda part: self._one_pass(latents[part], prompts[part], optional))
        names = [name for name in self.rewards if all(name in part for part in parts)]
        sizes = [request.size for request in requests]
        split = {name: torch.cat([part[name] for part in parts]).split(sizes) for name in names}
        return [
            _checked(request, {name: scores[i].numpy() for name, scores in split.items()})
            for i, request in enumerate(requests)
        ]

    def _one_pass(self, latents: Array, prompts: Sequence[str], optional: Sequence[str]) -> dict[str, torch.Tensor]:
        """Scores of some samples, ``[samples]`` each, on the CPU, by every reward but optional ones that failed."""
        batch = Batch(self.decode(latents), prompts)
        found: dict[str, torch.Tensor] = {}
        for name in self.rewards:
            try:
                found[name] = self._scores(name, batch, prompts)
            except RewardError as error:
                if name not in optional:
                    raise
                log.warning("left out of an answer: %s", str(error))
        return found

    def _scores(self, name: str, batch: Batch, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``[len(prompts)]`` of one reward; raises RewardError if it fails or gives another shape."""
        try:
            scores = batch.score(self.rewards[name]).float().cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RewardError(f"outcome reward {name!r} failed: {type(error).__name__}: {error}", [name]) from error
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"outcome reward {name!r} gave {list(scores.shape)} numbers for {len(prompts)} videos, for example of "
                f"{prompts[0]!r}: not one finite number a video",
                [name],
            )
        return scores


def _checked(request: OrmRequest, scores: Mapping[str, Array]) -> OrmAnswer | RewardError:
    finite = dict(scores)
    for name, values in scores.items():
        bad = ~np.isfinite(values.astype(np.float64))
        if not bad.any():
            continue
        error = NonFiniteRewardError(
            f"outcome reward {name!r} gave {values.tolist()} for {len(values)} videos, for example of "
            f"{request.prompts[int(bad.argmax())]!r}: not one finite number a video",
            [name],
        )
        if name not in request.optional:
            return error
        log.warning("left out of an answer: %s", error)
        del finite[name]
    return finite


class OrmActor:
    """The Ray actor, on asyncio, around an :class:`OrmScorer`, which computes in a thread of its own."""

    def __init__(self, index: int, config: RunConfig) -> None:
        keep_role_log(config.run_dir, f"orm-{index}")
        pool = config.pools.orm
        torch.set_num_threads(pool.threads)
        self.index = index
        self.device = reserved_device(pool.num_gpus)
        import_networks()
        self.scorer = OrmScorer(config.rewards.outcome, open_generator(config.model), self.device, pool)
        self.batcher: MicroBatcher[OrmRequest, OrmAnswer] = MicroBatcher(
            Tracer(config, f"orm-{index}").around(self.scorer.score_requests), WHAT, pool
        )

    def __repr__(self) -> str:
        return f"orm-{self.index}"

    async def ready(self) -> Readiness:
        """Answers once decoder and rewards are loaded."""
        return Readiness(device=str(self.device), node=node_id(), busy_s=self.batcher.worked_s)

    async def score(
        self,
        latents: Array,
        prompts: Sequence[str],
        deadline_s: float = float("inf"),
        optional: Sequence[str] = (),
    ) -> tuple[OrmAnswer, float]:
        """Scores one request, together with others that wait.

        Args:
            latents: float32 ``[samples, *latent]``.
            prompts: one text a sample.
            deadline_s: seconds after which the answer is of no use.
            optional: as in :class:`OrmRequest`.

        Returns:
            Rewards by name, ``[samples]`` each, and the seconds that the request took, waiting included.

        Raises:
            NonFiniteRewardError: a reward of this request is not finite.
            RewardError: a reward failed on it, or its deadline had passed before it was computed.
        """
        began = time.perf_counter()
        request = OrmRequest(np.asarray(latents), prompts, tuple(optional))
        scores = await self.batcher.submit(request, deadline_s)
        return scores, time.perf_counter() - began

    async def videos(self, latents: Array) -> Videos:
        """Decodes latents ``[batch, *latent]`` to uint8 ``[batch, frames, height, width, 3]``."""
        return await self.batcher.run(lambda: self.scorer.videos(latents))
