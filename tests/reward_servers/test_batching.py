"""Merging of requests, on asyncio without Ray."""

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from euphonium.config import RewardPoolConfig
from euphonium.errors import NonFiniteRewardError, RewardError
from reward_servers.batching import MicroBatcher, isolated


@dataclass(frozen=True)
class Number:
    """A request to double a number; ``bad`` ones fail in some way."""

    value: int
    size: int = 1
    key: str = ""
    bad: str = ""

    @property
    def label(self) -> str:
        return f"number {self.value}"


class Doubler:
    """The model: notes its passes, and can be held up."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.threads: set[str] = set()
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, requests: Sequence[Number]) -> list[int | RewardError]:
        self.entered.set()
        assert self.go.wait(10)
        self.threads.add(threading.current_thread().name)
        self.passes.append([request.value for request in requests])
        if any(request.bad == "raises" for request in requests):
            raise RuntimeError("no such number")
        spoilt = any(request.bad == "spoils all" for request in requests)
        return [
            NonFiniteRewardError(f"{r.label} is not finite") if spoilt or r.bad == "nan" else 2 * r.value
            for r in requests
        ]


Batcher = MicroBatcher[Number, int]


def run(
    scenario: Callable[[Batcher, Doubler], Awaitable[Any]],
    *,
    max_batch: int = 4,
    wait_s: float = 0.0,
    merge: bool = True,
) -> Any:
    pool = RewardPoolConfig(max_batch=max_batch, wait_ms=1000 * wait_s, merge=merge)

    async def main() -> Any:
        model = Doubler()
        batcher: Batcher = MicroBatcher(model, "the doubler", pool)
        try:
            return await asyncio.wait_for(scenario(batcher, model), 20)
        finally:
            model.go.set()
            await batcher.close()

    return asyncio.run(main())


def test_a_failed_merged_pass_is_gone_before_its_requests_are_tried_alone() -> None:
    """An exception's traceback holds the frames, and with them the activations, of the pass that failed."""

    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []
    alive: list[bool] = []

    def compute(requests: Sequence[Number]) -> list[int | RewardError]:
        alive.extend(activations() is not None for activations in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        if len(requests) > 1:
            raise RuntimeError("out of memory")
        return [2 * requests[0].value]

    assert isolated(compute, [Number(1), Number(2)], "the doubler") == [2, 4]
    assert alive
    assert not any(alive)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def held(batcher: Batcher, model: Doubler, requests: Sequence[Number]) -> list[Any]:
    """Answers to requests that all arrive while the model is busy with number 0."""
    model.go.clear()
    first = asyncio.ensure_future(batcher.submit(Number(0)))
    await until(model.entered.is_set)
    rest = [asyncio.ensure_future(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0.01)
    model.go.set()
    return (await asyncio.gather(first, *rest, return_exceptions=True))[1:]


def test_what_arrives_while_the_model_works_shares_the_next_pass() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        answers = await held(batcher, model, [Number(i) for i in range(1, 7)])
        assert answers == [2, 4, 6, 8, 10, 12]
        assert model.passes == [[0], [1, 2, 3, 4], [5, 6]]
        assert len(model.threads) == 1
        assert "compute" in model.threads.pop()

    run(scenario)


def test_requests_with_other_keys_wait_for_a_pass_of_their_own() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        keys = ["a", "b", "a", "b", "a"]
        answers = await held(batcher, model, [Number(i, key=key) for i, key in enumerate(keys, 1)])
        assert answers == [2, 4, 6, 8, 10]
        assert model.passes == [[0], [1, 3, 5], [2, 4]]

    run(scenario)


def test_without_merging_every_request_has_a_pass_of_its_own_and_nobody_waits_for_company() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        began = time.monotonic()
        assert await held(batcher, model, [Number(i, size=i) for i in range(1, 4)]) == [2, 4, 6]
        assert model.passes == [[0], [1], [2], [3]]
        assert time.monotonic() - began < 5

    run(scenario, wait_s=10, merge=False)


def test_samples_are_what_counts_and_a_request_that_is_too_large_goes_alone() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        sizes = [3, 2, 1, 9, 1]
        answers = await held(batcher, model, [Number(i, size=size) for i, size in enumerate(sizes, 1)])
        assert answers == [2, 4, 6, 8, 10]
        assert model.passes == [[0], [1, 3], [2, 5], [4]]

    run(scenario)


def test_an_idle_model_waits_for_company() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        began = time.monotonic()
        one = asyncio.ensure_future(batcher.submit(Number(1)))
        await asyncio.sleep(0.05)
        two = asyncio.ensure_future(batcher.submit(Number(2)))
        assert await asyncio.gather(one, two) == [2, 4]
        waited = time.monotonic() - began
        assert model.passes == [[1, 2]]
        assert 1 <= waited < 10

    run(scenario, wait_s=1)


def test_a_full_pass_does_not_wait() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        await asyncio.wait_for(asyncio.gather(*(batcher.submit(Number(i)) for i in range(4))), timeout=60)

    run(scenario, wait_s=600)


def test_clients_that_come_back_together_share_every_pass() -> None:
    """Without a wait after a pass they would fall into two halves that take turns."""

    async def scenario(batcher: Batcher, model: Doubler) -> None:
        async def client(index: int) -> None:
            for _ in range(5):
                assert await batcher.submit(Number(index)) == 2 * index

        await asyncio.gather(*(client(i) for i in range(3)))
        assert model.passes == [[0, 1, 2]] * 5

    run(scenario, wait_s=0.1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [("raises", "the doubler failed on 'number 2': RuntimeError: no such number"),
     ("nan", "number 2 is not finite"), ("spoils all", "number 2 is not finite")],
)  # fmt: skip
def test_a_bad_request_fails_alone(bad: str, message: str) -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        answers = await held(batcher, model, [Number(1), Number(2, bad=bad), Number(3), Number(4)])
        assert answers[0] == 2
        assert answers[2:] == [6, 8]
        assert isinstance(answers[1], RewardError)
        assert str(answers[1]) == message
        assert model.passes[1] == [1, 2, 3, 4]
        assert await batcher.submit(Number(5)) == 10

    run(scenario)


def test_the_error_of_a_request_is_typed_and_keeps_its_cause() -> None:
    (answer,) = isolated(Doubler(), [Number(7, bad="raises")], "the doubler")
    assert type(answer) is RewardError
    assert isinstance(answer.__cause__, RuntimeError)


def test_a_request_is_not_computed_after_its_deadline_or_when_nobody_waits() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        model.go.clear()
        first = asyncio.ensure_future(batcher.submit(Number(0)))
        await until(model.entered.is_set)
        late = asyncio.ensure_future(batcher.submit(Number(1), deadline_s=0.01))
        given_up = asyncio.ensure_future(batcher.submit(Number(2)))
        wanted = asyncio.ensure_future(batcher.submit(Number(3), deadline_s=60))
        await asyncio.sleep(0.05)
        given_up.cancel()
        model.go.set()
        with pytest.raises(RewardError, match="came to 'number 1' after its deadline"):
            await late
        assert await asyncio.gather(first, wanted) == [0, 6]
        assert model.passes == [[0], [3]]

    run(scenario)


def test_the_event_loop_answers_while_the_model_works() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        model.go.clear()
        pending = asyncio.ensure_future(batcher.submit(Number(1)))
        await until(model.entered.is_set)
        assert not pending.done()
        model.go.set()
        assert await pending == 2
        assert batcher.worked_s > 0
        assert await batcher.run(lambda: threading.current_thread().name in model.threads)

    run(scenario)


def test_closing_fails_what_still_waits() -> None:
    async def scenario(batcher: Batcher, model: Doubler) -> None:
        model.go.clear()
        pending = [asyncio.ensure_future(batcher.submit(Number(i))) for i in range(6)]
        await asyncio.sleep(0.05)
        threading.Timer(0.1, model.go.set).start()
        await batcher.close()
        for answer in await asyncio.gather(*pending, return_exceptions=True):
            assert isinstance(answer, RewardError)

    run(scenario)
