"""Seconds of an iteration, and the split that makes it shortest."""

import dataclasses
import functools
import itertools

import pytest

from orchestrator.plan.hardware import Hardware
from orchestrator.plan.timing import Speeds, Split, best_split, iteration_time, turns_time
from orchestrator.plan.workload import Workload

WORK = Workload(
    groups=12, group_size=8, steps=10, alike=0, guided=4, scored=0, decodes=1, rows=80, states=80, updates=2,
    refreshed_pairs=0, references=0, latent_values=1, group_bytes=0, evaluation_velocities=0, evaluation_samples=0,
    piece=8,
)  # fmt: skip
SPEED = Speeds(
    velocity=1.0, gradient=0.5, score=0.0, decode=0.1, micro_step=0.2, update=0.0, refresh=0.0, zero_bytes=0,
    whole_bytes=0, iteration_bytes=0, publication_bytes=0, rows=1, sharing=1, exchanged_bytes=0,
)  # fmt: skip
NEAR = Hardware()


def seconds(split: Split, *, overlapped: bool = False) -> float:
    return iteration_time(SPEED, WORK, split, NEAR, overlapped=overlapped).total


def test_enough_prm_servers_hide_behind_the_velocity() -> None:
    few = iteration_time(SPEED, WORK, Split(rollout=6, prm=1, orm=1, learner=1), NEAR, overlapped=False)
    enough = iteration_time(SPEED, WORK, Split(rollout=6, prm=3, orm=1, learner=1), NEAR, overlapped=False)
    # Two waves of ten steps, of which four wait for six answers of half a second.
    assert few.rollout == 2 * (6 * 1.0 + 4 * 3.0)
    assert enough.rollout == 2 * 10 * 1.0


def test_an_iteration_is_a_sum_or_the_longer_half() -> None:
    split = Split(rollout=6, prm=3, orm=2, learner=4)
    time = iteration_time(SPEED, WORK, split, NEAR, overlapped=False)
    assert time.update == 2 * (6 * 80 / 4) * 0.2
    # Half of the samples come in the last wave, to two servers.
    assert time.scoring == pytest.approx(48 * 0.1 / 2)
    assert time.total == time.rollout + time.scoring + time.update
    assert seconds(split, overlapped=True) == max(time.rollout + time.scoring, time.update)


def test_a_streamed_iteration_hides_the_shorter_half_of_the_first_update_but_for_a_wave() -> None:
    split = Split(rollout=2, prm=3, orm=12, learner=4)
    work = dataclasses.replace(WORK, updates=1)
    waiting = iteration_time(SPEED, work, split, NEAR, overlapped=False)
    streamed = iteration_time(SPEED, work, split, NEAR, overlapped=False, streamed=True)
    sampling = waiting.rollout + waiting.scoring
    assert sampling > waiting.update
    assert streamed.total == pytest.approx(sampling + waiting.update / 6)
    slow = dataclasses.replace(split, learner=1)
    streamed = iteration_time(SPEED, work, slow, NEAR, overlapped=False, streamed=True)
    assert streamed.total == pytest.approx(sampling / 6 + 4 * waiting.update)
    two = iteration_time(SPEED, WORK, split, NEAR, overlapped=False, streamed=True)
    assert two.total == pytest.approx(sampling + waiting.update / 2 / 6 + waiting.update / 2)
    one_wave = Split(rollout=12, prm=3, orm=12, learner=4)
    waiting, streamed = (
        iteration_time(SPEED, work, one_wave, NEAR, overlapped=False, streamed=s) for s in (False, True)
    )
    assert streamed.total == waiting.total


def test_a_tail_that_is_split_takes_the_time_of_a_part() -> None:
    parted = dataclasses.replace(WORK, piece=1)
    for time_of in (turns_time, functools.partial(iteration_time, overlapped=False)):
        split = Split(rollout=8, prm=4, orm=12, learner=4)
        whole, shorter = (time_of(SPEED, work, split, NEAR) for work in (WORK, parted))
        assert shorter.rollout == pytest.approx(0.75 * whole.rollout)
        assert shorter.total == pytest.approx(whole.total - whole.rollout / 4)
        full = dataclasses.replace(split, rollout=6)
        assert time_of(SPEED, parted, full, NEAR) == time_of(SPEED, WORK, full, NEAR)


def test_a_refresh_takes_its_time_between_iterations() -> None:
    split = Split(rollout=6, prm=3, orm=2, learner=4)
    refreshed = dataclasses.replace(SPEED, refresh=7.0)
    for time_of in (turns_time, functools.partial(iteration_time, overlapped=False)):
        assert time_of(refreshed, WORK, split, NEAR).total - time_of(SPEED, WORK, split, NEAR).total == pytest.approx(7)


def test_the_best_split_is_the_best_of_all() -> None:
    found = best_split(12, with_prm=True, smallest_learner=2, sharing=1, time_of=seconds)
    every = [
        Split(rollout=r, prm=p, orm=o, learner=n)
        for r, p, o, n in itertools.product(range(1, 12), repeat=4)
        if r + p + o + n == 12 and n >= 2
    ]
    assert found is not None
    assert seconds(found) == min(map(seconds, every))
    assert best_split(12, with_prm=False, smallest_learner=2, sharing=1, time_of=seconds).prm == 0
    assert best_split(3, with_prm=True, smallest_learner=1, sharing=1, time_of=seconds) is None


def test_collectives_between_nodes_are_as_fast_as_the_network() -> None:
    hardware = Hardware(gpus_per_node=8, nvlink_gbs=300, network_gbs=10)
    assert hardware.collective_s(30e9, 8) == pytest.approx(0.1)
    assert hardware.collective_s(30e9, 16) == pytest.approx(1.5)
