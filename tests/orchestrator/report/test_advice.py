from orchestrator.report.advice import advice

SIZES = {"rollout": 2, "prm": 1, "orm": 1, "learner": 4}


def test_the_pool_that_holds_up_the_rest_is_named() -> None:
    line = advice({"rollout": 0.97, "prm": 0.5, "orm": 0.1, "learner": 0.42}, SIZES, 1)
    assert line == ("idle: orm 90%, learner 58%, prm 50%; the 2 rollout actors hold up the rest: add rollout actors")
    line = advice({"rollout": 0.3, "prm": 0.2, "orm": 0.1, "learner": 0.95}, SIZES, 1)
    assert line is not None
    assert "the 4 learner ranks hold up the rest" in line
    line = advice({"rollout": 0.3, "prm": 0.2, "orm": 0.1, "learner": 0.95}, SIZES | {"learner": 1}, 1)
    assert line is not None
    assert "the learner rank holds up the rest" in line


def test_taking_turns_is_answered_with_overlap() -> None:
    line = advice({"rollout": 0.55, "prm": 0.5, "orm": 0.5, "learner": 0.45}, SIZES, 0)
    assert line is not None
    assert "rollout.max_staleness=1" in line


def test_nobody_waits_nothing_is_said() -> None:
    assert advice({"rollout": 0.9, "prm": 0.7, "orm": 0.7, "learner": 0.8}, SIZES, 1) is None
