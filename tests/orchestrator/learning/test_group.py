"""When the end of the learner group is an error."""

from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from orchestrator.learning.group import LearnerGroup
from orchestrator.learning.launcher import Launch


def test_only_a_group_that_was_dismissed_may_end(make_config: Callable[..., RunConfig]) -> None:
    group = LearnerGroup(make_config(), "namespace", "buffer", "store")
    group._launch = Launch(lambda: None, "group")
    group.start()
    group.join(10)
    with pytest.raises(TrainingError, match="has ended before the run did"):
        group.check()
    # The last evaluation comes after the last update, and may take longer than the group needs to end.
    group.dismiss()
    group.check()
