"""Work on a thread of its own, and what becomes of its error."""

import threading

import pytest

from euphonium.errors import TrainingError
from orchestrator.learning.launcher import Launch, deepest_reason


def test_work_is_waited_for_as_long_as_asked() -> None:
    release = threading.Event()
    launch = Launch(release.wait, "work")
    launch.start()
    assert not launch.join(0.01)
    assert launch.running
    release.set()
    assert launch.join(10)
    assert not launch.running
    launch.check("the group")


def test_an_error_waits_for_whoever_asks() -> None:
    def fail() -> None:
        raise ValueError("wrapped:\n  worker 1 of 2\n  the loss is not finite\n")

    launch = Launch(fail, "work")
    launch.start()
    assert launch.join(10)
    with pytest.raises(TrainingError, match=r"^the group is gone: the loss is not finite$") as error:
        launch.check("the group")
    assert isinstance(error.value.__cause__, ValueError)


def test_an_error_without_words_is_named_by_its_type() -> None:
    assert deepest_reason(KeyboardInterrupt()) == "KeyboardInterrupt"
