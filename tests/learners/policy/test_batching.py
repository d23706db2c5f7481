import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from euphonium.wire.records import GroupPayload
from learners.policy.batching import MicroBatch, dealt, load_rows, plan_beginning, plan_updates
from learners.policy.objective import Transitions
from tests.learners.groups import training_group


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    updates=st.integers(1, 5),
    size=st.integers(1, 17),
    world=st.integers(1, 7),
)
def test_every_row_is_trained_once_and_ranks_stay_in_step(rows: list[int], updates: int, size: int, world: int) -> None:
    plan = plan_updates([(n, n) for n in rows], updates, size, world)
    assert len(plan) == min(updates, len(rows))
    seen: list[tuple[int, int]] = []
    for shares in plan:
        assert len({len(share) for share in shares}) == 1
        live = [batch for share in shares for batch in share if batch.weight > 0]
        count = sum(batch.end - batch.begin for batch in live)
        for batch in live:
            assert batch.end - batch.begin <= size
            # Averaged over the ranks, the rows of an update weigh 1 together.
            np.testing.assert_allclose(batch.weight * count / world, 1.0)
            seen += [(batch.group, row) for row in range(batch.begin, batch.end)]
    assert sorted(seen) == [(group, row) for group, n in enumerate(rows) for row in range(n)]


@given(
    states=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    lost=st.integers(0, 2),
    updates=st.integers(1, 3),
    size=st.integers(1, 5),
    world=st.integers(1, 4),
    data=st.data(),
)
def test_what_can_begin_is_what_the_whole_plan_begins_with(
    states: list[int], lost: int, updates: int, size: int, world: int, data: st.DataObject
) -> None:
    states[0] = max(1, states[0])
    sizes = [(12, n) for n in states]
    for update in dealt(len(sizes), updates):
        # As an update of which nothing would be left keeps a sample.
        if not any(states[g] for g in update):
            sizes[update[0]] = (12, 1)
    there = data.draw(st.integers(1, len(sizes)))
    whole = plan_updates(sizes, updates, size, world)[0]
    begun = plan_beginning(sizes[:there], len(sizes), updates, size, world)
    assert len(begun) == world
    for first, share in zip(begun, whole, strict=True):
        assert first == share[: len(first)]
        assert len(first) < len(share), "one micro-batch of each rank is left, to move the weights"
    if lost and any(begun):
        assert plan_beginning(sizes[:there], len(sizes) + lost * updates, updates, size, world) != begun


def test_a_rank_may_begin_as_soon_as_every_rank_has_a_micro_batch_and_one_is_left() -> None:
    sizes = [(4, 4)] * 3
    assert [len(plan_beginning(sizes[:n], 3, 1, 2, 2)[0]) for n in (1, 2, 3)] == [0, 1, 2]
    assert plan_beginning([(4, 0)], 3, 1, 2, 2) == [[], []], "nothing of a group without advantages is computed"


def test_rows_are_cut_sample_by_sample_with_their_own_advantages() -> None:
    group, kept, steps = 3, 2, 5
    payload = GroupPayload(
        # x_0 x_1 x_3 x_4, x_1 x_2 x_4 x_5, x_2 x_3 x_4
        states=np.array([[0], [1], [3], [4], [11], [12], [14], [15], [22], [23], [24]], dtype=np.float32),
        rows=np.array([[0, 2], [4, 6], [8, 9]]),
        next_rows=np.array([[1, 3], [5, 7], [9, 10]]),
        steps=np.array([[0, 3], [1, 4], [2, 3]]),
        log_probs=np.arange(group * kept, dtype=np.float32).reshape(group, kept) / 10,
        gradients=None,
        conditioning={"text": np.ones((1, 4), dtype=np.float32)},
    )
    advantages = np.arange(group * steps, dtype=np.float32).reshape(1, group, steps)

    def cut(samples: list[int], begin: int, end: int) -> Transitions:
        trained = training_group(payload, advantages, samples=np.array(samples))
        return load_rows(MicroBatch(group=0, begin=begin, end=end, weight=0.5), trained, payload, torch.device("cpu"))

    rows = cut([0, 1, 2], 1, 5)
    assert rows.states.flatten().tolist() == [3, 11, 14, 22]
    assert rows.next_states.flatten().tolist() == [4, 12, 15, 23]
    assert rows.steps.tolist() == [3, 1, 4, 2]
    assert rows.advantages.tolist() == [[advantages[0, i, k] for i, k in ((0, 3), (1, 1), (1, 4), (2, 2))]]
    torch.testing.assert_close(rows.log_probs, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert rows.conditioning["text"].shape == (4, 4)

    chosen = cut([0, 2], 1, 4)
    assert chosen.states.flatten().tolist() == [3, 22, 23]
    assert chosen.next_states.flatten().tolist() == [4, 23, 24]
    # The states of consecutive transitions are views of the memory that the group is in.
    last = cut([0, 1, 2], 4, 6)
    assert (last.states.tolist(), last.next_states.tolist()) == ([[22], [23]], [[23], [24]])
    payload.states[9] = 50
    assert (last.states.tolist(), last.next_states.tolist()) == ([[22], [50]], [[50], [24]])
    assert chosen.steps.tolist() == [3, 2, 3]
    assert chosen.advantages.tolist() == [[advantages[0, i, k] for i, k in ((0, 3), (2, 2), (2, 3))]]
