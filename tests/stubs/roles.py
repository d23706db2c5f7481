"""Roles whose computation is a sleep and a little arithmetic, around the real run loop, pools, buffer and transport.

What they compute forms a chain: samples depend on seed and weights, rewards on samples, weights on all groups that
were trained, in order. A group that is trained twice, left out, or drawn by other weights changes every later number,
so that runs can be compared as runs of the real roles can, in a fraction of the time. The run loop's tests and the
benchmarks of the service share these roles.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml
from torch import Tensor
from typing_extensions import override

from actors.drawn import put_together
from actors.members import Members
from actors.rollout import RolloutActor
from actors.sampler import state_rows
from euphonium.config import RunConfig, load_config
from euphonium.errors import LostActorError, TrainingError
from euphonium.wire.deadlines import get
from euphonium.wire.records import (
    Begin,
    GroupInfo,
    GroupPayload,
    GroupTask,
    Publish,
    Readiness,
    Save,
    Update,
    UpdateReport,
)
from euphonium.wire.roles import Mailbox, OrmServer, RolloutServer, WeightDirectory, named_actor, start_actor
from euphonium.wire.weights.manifest import WeightManifest, pack
from orchestrator.learning.link import MAILBOX, STORE
from orchestrator.pools.run_pools import ActorFactories
from orchestrator.run import Run
from orchestrator.state.checkpoints import Checkpoint

SIZE = 16

# Workers cannot import the tests: what is defined here travels to them whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def stub_recipe(folder: Path, name: str, *overrides: str, prompts: int = 100) -> RunConfig:
    """A recipe for these roles, with ``a.b=c`` overrides; writes it and its prompts into a folder."""
    (folder / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(prompts)))
    (folder / "held_out.txt").write_text("held out 1\nheld out 2")
    actor = {"num_cpus": 0.01}
    tree = {
        "name": name, "output_dir": str(folder / "runs"), "iterations": 8,
        "model": {"path": "none", "frames": 9, "height": 32, "width": 32, "max_prompt_tokens": 16},
        "prompts": {"train": str(folder / "train.txt"), "evaluation": str(folder / "held_out.txt")},
        "sampler": {"law": "dance", "eta": 0.5, "num_steps": 4},
        "rollout": {"prompts_per_iteration": 3, "group_size": 2},
        "rewards": {"outcome": [{"name": "icon", "type": "sprite_icon"}, {"name": "motion", "type": "sprite_motion"}]},
        "optimizer": {"learning_rate": 1e-4},
        "evaluation": {"every": 1_000_000, "clips": 0, "prompts": 2},
        "pools": {
            "rollout": {"num_actors": 2, **actor}, "orm": actor, "learner": {"num_workers": 1, **actor},
            "start_timeout_s": 900, "rejoin_timeout_s": 900,
        },
        "checkpoint": {"every": 1_000_000},
        "metrics": {"tensorboard": False, "prometheus_port": None},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, overrides)


class StubWorker:
    """Stands in for :class:`actors.rollout.RolloutWorker`."""

    def __init__(self, config: RunConfig, seconds: float, values: int) -> None:
        self.config, self.seconds, self.values = config, seconds, values
        self.weights = np.zeros(SIZE, dtype=np.float32)
        self.policy_version = 0
        self.device = "cpu"

    def load_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name == "w":
                self.weights = tensor.numpy().copy()
        self.policy_version = version

    def generate(self, task: GroupTask, _source: Any) -> tuple[GroupInfo, Any, GroupPayload]:
        began = time.perf_counter()
        members = Members.of_task(task, self.config.rollout.group_size)
        group = members.count
        time.sleep(self.seconds * group / members.group)
        noise = np.random.default_rng(task.seed).standard_normal((members.group, SIZE), dtype=np.float32)
        latents = noise[members.first : members.first + group] + self.weights
        states = np.zeros((2 * group, self.values), dtype=np.float32)
        states[::2, :SIZE] = latents
        payload = GroupPayload(
            states=states, rows=2 * np.arange(group)[:, None],
            next_rows=2 * np.arange(group)[:, None] + 1, steps=np.zeros((group, 1), dtype=np.int64),
            log_probs=np.zeros((group, 1), dtype=np.float32), gradients=None, conditioning={},
        )  # fmt: skip
        info = GroupInfo(
            task=task, policy_version=self.policy_version, fingerprint="stub", rows=payload.rows,
            process_rewards=None, payload_bytes=payload.nbytes,
            seconds={"total": time.perf_counter() - began, "process_reward": 0.0},
        )  # fmt: skip
        return info, latents, payload

    def merge(
        self, infos: Sequence[GroupInfo], latents: Sequence[Any], payloads: Sequence[GroupPayload]
    ) -> tuple[GroupInfo, Any, GroupPayload]:
        return put_together(infos, latents, payloads, state_rows)

    def evaluate(self, prompts: list[str], seeds: list[int]) -> Any:
        noise = np.stack([np.random.default_rng(seed).standard_normal(SIZE) for seed in seeds])
        return (noise + self.weights).astype(np.float32)


def take_long_if_restarted(seconds: float) -> None:
    """Stands in for the loading of a model, where an actor starts in place of one that died."""
    if ray.get_runtime_context().was_current_actor_reconstructed:
        time.sleep(seconds)


class StubRollout(RolloutActor):
    """The real actor around a stub worker."""

    def __init__(self, index: int, config: RunConfig, seconds: float, values: int, restart_s: float) -> None:
        take_long_if_restarted(restart_s)
        super().__init__(index, config, STORE, lambda config, _device: StubWorker(config, seconds, values))


class StubJudge:
    """Outcome rewards: the mean of the latents' first half and of their second."""

    def __init__(self, seconds: float, restart_s: float) -> None:
        take_long_if_restarted(restart_s)
        self.seconds = seconds

    def ready(self) -> Readiness:
        return Readiness(device="cpu", busy_s=None)

    def score(
        self, latents: Any, prompts: list[str], deadline_s: float = float("inf"), optional: Sequence[str] = ()
    ) -> tuple[dict[str, Any], float]:
        time.sleep(self.seconds)
        half = latents.shape[1] // 2
        scores = {"icon": latents[:, :half].mean(1), "motion": latents[:, half:].mean(1)}
        return {name: values.astype(np.float32) for name, values in scores.items()}, self.seconds


class StubLearners:
    """Stands in for :class:`orchestrator.learning.group.LearnerGroup`: a thread that is a learner of one rank.

    Args:
        seconds: that an update takes.
        weight_values: float32 values published besides the weights themselves.
        crashes: iterations in whose update it dies, once each, to start anew from the checkpoint.
        early_crashes: the same before all groups of the iteration are there.
    """

    def __init__(
        self, seconds: float, weight_values: int = 0, crashes: set[int] | None = None,
        early_crashes: set[int] | None = None,
    ) -> None:  # fmt: skip
        self.seconds, self.crashes = seconds, crashes if crashes is not None else set()
        self.early_crashes = early_crashes if early_crashes is not None else set()
        self.beginnings: list[tuple[int, ...]] = []
        self.padding = torch.zeros(weight_values)
        self.restarts = 0
        self.replaced = False
        self._dismissed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def check(self) -> None:
        """Raises if the thread has ended, unless it may."""
        if not self._dismissed and not self._thread.is_alive():
            raise TrainingError(f"the learner group is gone: {self._error}")

    def dismiss(self) -> None:
        """The thread may end."""
        self._dismissed = True

    def join(self, timeout_s: float) -> None:
        """Waits for the thread."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                self._attempt()
                return
            except LostActorError:
                if self.replaced:
                    return
                self.restarts += 1
                time.sleep(0.5)
            except BaseException as error:
                self._error = error
                return

    def _attempt(self) -> None:
        mailbox, self.store = named_actor(Mailbox, MAILBOX), named_actor(WeightDirectory, STORE)
        attempt = uuid.uuid4().hex
        folder, version = get(mailbox.join.remote(attempt, 1), 60, "join")
        self.weights = np.zeros(SIZE, dtype=np.float32)
        self.begun: tuple[int, ...] = ()
        if folder is not None:
            self.weights = np.array(json.loads((Path(folder) / "weights.json").read_text()), dtype=np.float32)
        self._publish(version, "policy")
        get(mailbox.learner_ready.remote(attempt), 60, "ready")
        while True:
            began = time.perf_counter()
            order = get(mailbox.lease.remote(0, attempt), None, "an order")
            metrics = {"time/learner_wait_s": time.perf_counter() - began}
            metrics |= {"time/publish_s": 0.0, "policy/ratio_deviation": 0.0, "policy/grad_norm": 0.0}
            assert order.version == version + isinstance(order, Update), (order, version)
            if isinstance(order, Begin):
                metrics["time/update_s"] = self._begin(order)
            if isinstance(order, Update):
                metrics["time/update_s"] = self._train(order)
                version = order.version
                metrics["policy/loss"] = float(self.weights.mean())
            if not isinstance(order, Save | Begin):
                published = time.perf_counter()
                self._publish(version, "policy")
                metrics["time/publish_s"] = time.perf_counter() - published
                if order.average if isinstance(order, Publish) else order.publish_average:
                    self._publish(version, "average")
            folder = order.folder if isinstance(order, Save) else getattr(order, "checkpoint", None)
            if folder is not None:
                (Path(folder) / "weights.json").write_text(json.dumps(self.weights.tolist()))
            report = UpdateReport(version=order.version, metrics=metrics)
            get(mailbox.acknowledge.remote(0, attempt, report), 60, "acknowledge")
            if order.stop:
                return

    def _begin(self, order: Begin) -> float:
        """Trains on the first groups, beside the weights; returns the seconds that it took."""
        if order.version + 1 in self.early_crashes:
            self.early_crashes.remove(order.version + 1)
            raise LostActorError("crashed early")
        seconds = self._go_on(order, self.seconds / order.expected)
        self.beginnings.append(self.begun)
        return seconds

    def _train(self, order: Update) -> float:
        if order.version in self.crashes:
            self.crashes.remove(order.version)
            raise LostActorError("crashed")
        seconds = self._go_on(order, self.seconds / len(order.groups))
        self.weights, self.begun = self.ahead, ()
        return seconds

    def _go_on(self, order: Begin | Update, each: float) -> float:
        """Trains on those of an order's groups that it has not trained on yet."""
        ordinals = tuple(group.info.task.group_id for group in order.groups)
        if not self.begun or ordinals[: len(self.begun)] != self.begun:
            self.begun, self.ahead = (), self.weights
        payloads = get(list(order.payloads[len(self.begun) :]), 60, "groups")
        time.sleep(each * len(payloads))
        for payload in payloads:
            self.ahead = 0.9 * self.ahead + 0.1 * payload.states[payload.rows[:, 0], :SIZE].mean(0)
        self.begun = ordinals
        return each * len(payloads)

    def _publish(self, version: int, kind: str) -> None:
        for _ in range(20):
            try:
                data, manifest = pack({"w": torch.from_numpy(self.weights.astype(np.float32)), "p": self.padding})
                get(self.store.put_bucket.remote(version, kind, 0, [ray.put(data)], False), 60, "bucket")
                whole = WeightManifest(version=version, kind=kind, buckets=(manifest,))
                get(self.store.commit.remote(whole), 60, "commit")
                return
            except LostActorError:
                time.sleep(0.5)
        raise LostActorError("the store is gone")


class StubRun(Run):
    """A run with these roles."""

    rollout_s, score_s, update_s, restart_s = 0.05, 0.0, 0.05, 0.0
    values, weight_values = 64, 0
    crashes: set[int] = set()  # noqa: RUF012
    early_crashes: set[int] = set()  # noqa: RUF012

    def __init__(self, config: RunConfig, namespace: str, resume: Checkpoint | None) -> None:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(config, namespace, resume)

    @override
    def actors(self) -> ActorFactories:
        config, seconds, values, score, again = self.config, self.rollout_s, self.values, self.score_s, self.restart_s
        return ActorFactories(
            orm=lambda _, options: start_actor(OrmServer, StubJudge, options, score, again),
            rollout=lambda i, options: start_actor(
                RolloutServer, StubRollout, options, i, config, seconds, values, again
            ),
        )

    @override
    def learner_group(self) -> Any:
        return StubLearners(self.update_s, self.weight_values, set(self.crashes), set(self.early_crashes))

    @override
    def export(self) -> None:
        """Nothing that could be exported was trained."""
