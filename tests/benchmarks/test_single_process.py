from collections.abc import Callable

import pytest
import torch

from benchmarks.single_process import SingleProcess, main
from euphonium.config import RunConfig


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_groups_are_as_stale_as_the_recipe_allows(make_config: Callable[..., RunConfig], lag: int) -> None:
    """The ratio of a group's first update is 1 when the present policy drew it, and only then."""
    run = SingleProcess(
        make_config(
            "iterations=4", "rewards.process=null", "sampler.guidance=null", "advantage.mode=outcome",
            "optimizer.learning_rate=1e-3", "objective.old_log_probs=rollout", f"rollout.max_staleness={lag}",
        )
    )  # fmt: skip
    deviations = [run.iterate()["policy/ratio_deviation"] for _ in range(3)]
    assert deviations[0] < 1e-5
    assert [deviation > 1e-5 for deviation in deviations[1:]] == [lag > 0] * 2


def test_a_stale_group_is_drawn_by_the_policy_of_its_version(make_config: Callable[..., RunConfig]) -> None:
    run = SingleProcess(make_config("iterations=4", "rollout.max_staleness=2"))
    begun = [parameter.detach().clone() for parameter in run.parameters]
    drawn: list[list[torch.Tensor]] = []
    generate = run.worker.generate

    def noting(*arguments: object) -> object:
        drawn.append([parameter.detach().clone() for parameter in run.parameters])
        return generate(*arguments)

    run.worker.generate = noting  # type: ignore[method-assign,assignment]
    groups = run.config.rollout.prompts_per_iteration
    for _ in range(3):
        run.iterate()
    for weights in drawn[: 3 * groups]:  # versions 0, 0 and 0
        torch.testing.assert_close(weights, begun, rtol=0, atol=0)
    after_three = [parameter.detach().clone() for parameter in run.parameters]
    run.iterate()
    assert any(not torch.equal(mine, first) for mine, first in zip(drawn[-1], begun, strict=True))  # version 1
    assert any(not torch.equal(mine, last) for mine, last in zip(drawn[-1], after_three, strict=True))


def test_a_mistake_in_the_recipe_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["single_process.py", "recipes/embedded/demo.yaml", "iterationz=3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "did you mean 'iterations'?" in capsys.readouterr().err
