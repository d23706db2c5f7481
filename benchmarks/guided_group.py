"""What guidance costs a group of samples, by where its gradients come from: Table 2 of the Euphonium paper, of groups.

    python benchmarks/guided_group.py --rounds 5

Groups of one rollout actor, from the same noise, on this machine; one thread for the actor and one for the server. Ways
take turns, so that whatever else the machine does falls on all; what counts are ratios to the unguided group.

Rows:
    unguided               no process reward at all.
    in this process        the gradient of the process reward model, then the velocity: what a single process does.
    server, in turn        the same by a PRM server, a Ray actor, which is waited for before the velocity.
    server, meanwhile      the server computes the gradient beside the velocity: what a run does.
    SPSA, K=...            no process reward model: the gradient is an estimate from the outcome rewards of 2 K decoded
                           predictions a sample and guided step, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
from torch import Tensor

from actors.prm_client import PrmClient
from actors.rollout import RolloutWorker
from actors.sampler import ProcessRewardSource, Rewarded, SourceFactory
from actors.sources import EqualStatesOnce
from actors.spsa import SpsaSource
from euphonium.config import RunConfig, load_config
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.rewards.total import weighted_total
from euphonium.wire.clients import RewardClient
from euphonium.wire.later import Later
from euphonium.wire.records import GroupTask
from euphonium.wire.roles import ServerRef
from reward_servers.orm import OrmScorer
from reward_servers.prm import PrmActor

CPU = torch.device("cpu")
UNGUIDED = ("sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome", "advantage.baseline=group")
PROMPT = "a red car moving left on a white background"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way of drawing a group.

    Attributes:
        name: of the way.
        seconds: median of a group.
        ratio: of that to the unguided group's.
        guided_step: what guidance adds to a guided step, in unguided steps.
    """

    name: str
    seconds: float
    ratio: float
    guided_step: float


class InTurn:
    """A source whose answer is waited for at once. Implements :class:`actors.sampler.ProcessRewardSource`."""

    def __init__(self, source: ProcessRewardSource) -> None:
        self._source = source

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests and waits."""
        answer = self._source.submit(k, x, with_gradient=with_gradient)
        answer.result()
        return answer


def guided_ways(config: RunConfig) -> dict[str, tuple[RolloutWorker, SourceFactory]]:
    """The three ways of a process reward model; starts a PRM server."""
    process = config.rewards.process
    assert process is not None
    prm = ProcessRewardModel.load(Path(process.path), config.model)
    server = ray.remote(PrmActor).options(num_cpus=1).remote(0, config)
    ray.get(server.ready.remote())
    servers = RewardClient("prm", lambda: [ServerRef(server, "prm-0")], config.rewards, offset=0)
    worker = RolloutWorker(config, CPU)
    return {
        "in this process": (worker, lambda c, table, v: EqualStatesOnce(LocalRewards(prm, c, table.sigmas))),
        "server, in turn": (worker, lambda c, t, v: InTurn(EqualStatesOnce(PrmClient(servers, c, t, PROMPT)))),
        "server, meanwhile": (worker, lambda c, t, v: EqualStatesOnce(PrmClient(servers, c, t, PROMPT))),
    }


def spsa_way(config: RunConfig) -> tuple[RolloutWorker, SourceFactory]:
    """The outcome rewards of decoded predictions, in this process."""
    worker = RolloutWorker(config, CPU)
    scorer = OrmScorer(config.rewards.outcome, worker.family, CPU, config.pools.orm)
    assert config.sampler.guidance is not None
    settings = config.sampler.guidance.spsa

    def score(latents: Tensor) -> Later[Tensor]:
        scores = scorer.score(latents.numpy(), [PROMPT] * len(latents))
        total = torch.from_numpy(weighted_total(scores, config.rewards.outcome, len(latents))).float()
        return Later(lambda: total)

    return worker, lambda c, table, velocity: SpsaSource(
        table, velocity, score, perturbations=settings.perturbations, scale=settings.scale, seed=0
    )


def measure(recipe: str, overrides: list[str], perturbations: list[int], rounds: int) -> tuple[int, int, list[Row]]:
    """Number of steps, number of guided ones, and the rows."""
    guided: RunConfig = load_config(recipe, overrides)
    estimated: list[RunConfig] = [
        load_config(recipe, [*overrides, *UNGUIDED[1:], "sampler.guidance.source=spsa",
                             "sampler.guidance.control=null", f"sampler.guidance.spsa.perturbations={count}"])
        for count in perturbations
    ]  # fmt: skip
    ways: dict[str, tuple[RolloutWorker, SourceFactory | None]] = {
        "unguided": (RolloutWorker(load_config(recipe, [*overrides, *UNGUIDED]), CPU), None)
    }
    ways |= guided_ways(guided)
    ways |= {f"SPSA, K={count}": spsa_way(config) for count, config in zip(perturbations, estimated, strict=True)}
    task = GroupTask(group_id=0, iteration=0, prompt=PROMPT, seed=0)
    table = ways["in this process"][0].table()
    steps, guided_steps = table.num_steps, len(table.guided_steps)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (worker, make_source) in ways.items():
            began = time.perf_counter()
            worker.generate(task, make_source)
            # The first turn warms up.
            if turn:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["unguided"]
    return (
        steps,
        guided_steps,
        [
            Row(name=name, seconds=median, ratio=median / base, guided_step=(median / base - 1) * steps / guided_steps)
            for name, median in medians.items()
        ],
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/embedded/euphonium.yaml", help="YAML recipe with guidance")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="groups of each way that count")
    parser.add_argument("--perturbations", type=int, nargs="+", default=[1, 2, 4, 8], help="values of SPSA's K")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    steps, guided, rows = measure(options.recipe, options.overrides, options.perturbations, options.rounds)
    print(f"{guided} of {steps} steps guided\n")
    print(f"{'group':<20}{'seconds':>9}{'ratio':>8}{'a guided step':>15}")
    for row in rows:
        print(f"{row.name:<20}{row.seconds:>9.3f}{row.ratio:>8.2f}{row.guided_step:>+15.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
