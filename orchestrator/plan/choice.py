"""What the plan chooses where a recipe of ``train`` says ``auto``, before anything starts.

A choice depends on the recipe and on the stated memory of its GPUs alone, so that it is the same wherever it is made.
What a run began with is recorded, and a resumed run keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import yaml

from euphonium.config import PrmConfig, RunConfig
from euphonium.config.base import Node
from euphonium.errors import ConfigError
from orchestrator.plan.fit import RoleFit, members_of
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import computes_in
from orchestrator.plan.meter import Cost
from orchestrator.plan.passes import Passes
from orchestrator.plan.sharing import fullest_gpu
from orchestrator.plan.timing import Split, iteration_time, speeds
from orchestrator.plan.workload import SHARD_FIELD, SIZE_FIELDS, PassSizes, Workload, replaced, workload_of

AUTO = "auto"
LEARNER, REFRESH = SIZE_FIELDS["learner"], SIZE_FIELDS["refresh"]
CHECKPOINTS = "rewards.process.refresh.gradient_checkpointing"
# Roles whose passes have a size, and their pools.
SIZED = {"learner": "learner", "rollout": "rollout", "prm": "prm", "decode": "orm", "refresh": "prm_refresh"}
# Share of a GPU that choices fill: plans are right to 5 %, and a learner cannot make its passes smaller.
FILLED = 0.9
# Seconds of an H100 from which a pass is long enough: below, it waits for the CPU that starts its kernels, or leaves a
# part of the GPU idle. A learner's has DeepSpeed's hooks besides. Above, more samples gain nothing and cost memory; the
# gradient of a process reward on two clips at a time even takes five times as long (docs/performance.md).
LONG_ENOUGH_S = {"rollout": 0.2, "prm": 0.1, "decode": 0.1, "refresh": 0.1, "learner": 0.3}
# A choice that costs more memory must save this share of the learner's time.
WORTH_IT = 0.05

Value = int | str
# Fields with what is chosen for them, and why.
Choices = dict[str, tuple[Value, str]]
_N = TypeVar("_N", bound=Node)
_C = TypeVar("_C", RunConfig, PrmConfig)


def open_fields(config: RunConfig | PrmConfig) -> list[str]:
    """Fields that the recipe leaves to the plan."""
    fields = (SHARD_FIELD, *SIZE_FIELDS.values()) if isinstance(config, RunConfig) else ("pairs.samples_per_pass",)
    return [field for field in fields if _value(config, field) == AUTO]


def settled(config: _C, choices: Choices) -> _C:
    """The recipe with numbers for all of its ``auto``, and a record of what was written and chosen."""
    for field, (value, why) in choices.items():
        config = _with(config, field, value)
        config = _with(config, "planned", {**config.planned, field: f"auto -> {value}: {why}"})
    return config


def as_recorded(config: _C, recorded: str) -> _C:
    """The recipe with what an earlier part of the same run had for its ``auto``.

    Args:
        config: the recipe.
        recorded: the recipe that the run recorded, as YAML.
    """
    old = yaml.safe_load(recorded)
    notes: Mapping[str, str] = old.get("planned") or {}
    for field in open_fields(config):
        value: Any = old
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int | str) and value != AUTO:
            config = _with(config, field, value)
            note = notes.get(field, f"auto -> {value}: of the run's last recipe")
            config = _with(config, "planned", {**config.planned, field: note})
    return config


def choose(config: RunConfig, gpu_gib: float | None, prm_blocks: Callable[[], int | None]) -> RunConfig:
    """The recipe with numbers for all of its ``auto``.

    Pools without GPUs take the fields' defaults. Without a stated memory of GPUs, and where a recipe cannot be planned,
    a pass gets one sample, and the ranks share the weights. May take a minute for the largest models, once.

    Args:
        config: the recipe.
        gpu_gib: memory of a GPU; None if it is not known.
        prm_blocks: reads the number of blocks of the process reward model.
    """
    choices: Choices = {}
    left = []
    for field in open_fields(config):
        if field == SIZE_FIELDS["prm"] and config.rewards.process is None:
            choices[field] = _default(config, field), "the default, as there is no process reward"
        elif _pool(config, field).num_gpus:
            left.append(field)
        else:
            choices[field] = _default(config, field), "the default, for CPUs"
    config = settled(config, choices)
    if not left:
        return config
    if gpu_gib is None:
        return _smallest(config, left, "the smallest, as pools.gpu_memory_gib does not say what a GPU has")
    try:
        return _Chooser(config, left, gpu_gib, prm_blocks()).choose()
    except ConfigError as error:
        return _smallest(config, left, f"the smallest, as there is no plan ({error})")


def _smallest(config: RunConfig, fields: list[str], why: str) -> RunConfig:
    return settled(config, {field: ("full" if field == SHARD_FIELD else 1, why) for field in fields})


def evenly(measured: Callable[[int], Cost]) -> Callable[[int], Cost]:
    """A pass as a function of its size, which is measured for one and two samples alone."""

    def cost(size: int) -> Cost:
        if size <= 2:
            return measured(size)
        one, two = (dataclasses.asdict(measured(n)) for n in (1, 2))
        return Cost(**{part: one[part] + (size - 1) * (two[part] - one[part]) for part in one})

    return cost


def smallest_that(suits: Callable[[int], bool], most: int) -> int:
    """The smallest size that suits, ``most`` if none does."""
    return next(filter(suits, range(1, most)), most)


class _EvenPasses(Passes):
    """Passes of which one and two samples are measured: costs grow evenly with the samples."""

    def _kept(self, name: str, run: Callable[[int], Cost]) -> Callable[[int], Cost]:
        return evenly(super()._kept(name, run))


class _Chooser:
    """Chooses one field after the other; those that are not chosen yet are as small as can be."""

    def __init__(self, config: RunConfig, fields: list[str], gpu_gib: float, prm_blocks: int | None) -> None:
        self._config, self._fields = config, fields
        self._whole, self._room = Hardware(gpu_gib=gpu_gib), Hardware(gpu_gib=gpu_gib * FILLED)
        smallest = _smallest(config, fields, "")
        self._passes = _EvenPasses(smallest, prm_blocks if config.rewards.process is not None else None)
        self._sizes = PassSizes.of(smallest)
        self._most = PassSizes.of(settled(config, {f: ("full" if f == SHARD_FIELD else 1 << 20, "") for f in fields}))
        self._work: Workload = workload_of(smallest, self._passes.generator)

    def choose(self) -> RunConfig:
        choices: Choices = {}
        if SHARD_FIELD in self._fields or LEARNER in self._fields:
            self._choose_learner()
        for role in SIZED:
            field = SIZE_FIELDS[role]
            if field not in self._fields:
                continue
            if role != "learner":
                self._choose_size(role)
            choices[field] = getattr(self._sizes, role), self._held(role)
        if SHARD_FIELD in self._fields:
            shard = "optimizer" if self._sizes.whole_weights else "full"
            choices[SHARD_FIELD] = shard, f"an update of {self._update_s(self._sizes):.3g} s; {self._held('learner')}"
        return settled(self._config, choices)

    def _choose_size(self, role: str) -> None:
        most = getattr(self._most, role)
        long_enough = self._long_enough(role, most)
        best = self._largest(role, long_enough)
        if role == "rollout":
            best = even_parts(self._work.group_size, best)
        self._sizes = self._of(role, best)

    def _choose_learner(self) -> None:
        """Chooses rows and sharding by the time of an update, and the least memory of those that are as good."""
        rows = self._work.states
        counts = [self._sizes.learner]
        if LEARNER in self._fields:
            fewest = even_parts(rows, self._largest("learner", self._long_enough("learner", rows)))
            counts = sorted({-(-rows // pieces) for pieces in range(1, -(-rows // fewest) + 1)})
        shards = (False, True) if SHARD_FIELD in self._fields else (self._sizes.whole_weights,)
        candidates = [
            sizes
            for whole in shards
            for count in counts
            if self._fits("learner", sizes := replaced(self._sizes, learner=count, whole_weights=whole))
        ]
        best = None
        for sizes in candidates:
            if best is None or self._update_s(sizes) < (1 - WORTH_IT) * self._update_s(best):
                best = sizes
        self._sizes = best or replaced(self._sizes, learner=counts[0], whole_weights=shards[0])

    def _long_enough(self, role: str, most: int) -> int:
        """Fewest samples that keep a GPU busy for long enough, ``most`` if none do."""
        costs = {
            "rollout": self._passes.velocity, "decode": self._passes.decode, "learner": self._passes.micro_step,
            "prm": self._passes.gradient if self._work.guided else self._passes.score,
            "refresh": self._passes.training_step(saving=bool(_value(self._config, CHECKPOINTS))),
        }  # fmt: skip
        kind = computes_in(self._passes, SIZED[role])
        enough = LONG_ENOUGH_S[role] * (self._sizes.sharing if role == "learner" else 1)
        return smallest_that(lambda n: self._whole.seconds(costs[role](n), kind) >= enough, most)

    def _largest(self, role: str, size: int) -> int:
        while size > 1 and not self._fits(role, self._of(role, size)):
            size -= 1
        return size

    def _of(self, role: str, size: int) -> PassSizes:
        found = replaced(self._sizes, **{role: size})
        return replaced(found, evaluation=min(size, self._most.evaluation)) if role == "rollout" else found

    def _fits(self, role: str, sizes: PassSizes) -> bool:
        members = members_of(self._passes, sizes, self._room)
        fits = _role(members, role).memory.fits(self._room)
        shared = fullest_gpu(members, self._room, overlapped=self._overlapped)
        return fits and (shared is None or shared.needed_gib <= self._room.gpu_gib)

    @property
    def _overlapped(self) -> bool:
        return self._config.rollout.max_staleness > 0

    def _update_s(self, sizes: PassSizes) -> float:
        pools = self._config.pools
        split = Split(rollout=1, prm=int(self._passes.prm_blocks is not None), orm=1, learner=pools.learner.num_workers)
        speed = speeds(self._passes, sizes, self._work, self._whole)
        return iteration_time(speed, self._work, split, self._whole, overlapped=False).update

    def _held(self, role: str) -> str:
        members = members_of(self._passes, self._sizes, self._whole)
        alone = _role(members, role).gpu_gib
        shared = fullest_gpu(members, self._whole, overlapped=self._overlapped)
        if shared is not None and SIZED[role] in shared.members:
            return f"{shared.needed_gib:.1f} GiB of {self._whole.gpu_gib:g} on a shared GPU"
        return f"{alone:.1f} GiB of {self._whole.gpu_gib:g}"


def _role(members: list[RoleFit], role: str) -> RoleFit:
    return next(fit for fit in members if fit.role == SIZED[role])


def even_parts(total: int, size: int) -> int:
    """The smallest size that cuts ``total`` into as few parts as ``size`` does.

    >>> [even_parts(12, size) for size in (1, 3, 5, 11, 12)]
    [1, 3, 4, 6, 12]
    """
    parts = -(-total // size)
    return -(-total // parts)


# --- fields by name ------------------------------------------------------------------------------------------------


def _value(node: Any, field: str) -> Any:
    for part in field.split("."):
        node = getattr(node, part, None)
    return node


def _with(node: _N, field: str, value: object) -> _N:
    name, _, inner = field.partition(".")
    new = _with(getattr(node, name), inner, value) if inner else value
    return node.model_copy(update={name: new})


def _pool(config: RunConfig, field: str) -> Any:
    role = next((role for role, name in SIZE_FIELDS.items() if name == field), "learner")
    return config.pools.refresh_pool if role == "refresh" else getattr(config.pools, SIZED[role])


def _default(config: RunConfig, field: str) -> Value:
    if field == REFRESH:
        return int(_value(config, "rewards.process.refresh.pairs_per_update"))
    section, _, name = field.rpartition(".")
    found: Value = type(_value(config, section)).model_fields[name].default
    return found
