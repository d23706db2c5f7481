"""A line to a learner group that is played in this process."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from euphonium.config import RunConfig
from orchestrator.learning import link as module
from orchestrator.learning.mailbox import LearnerMailbox
from tests.orchestrator.learning.in_process import Setting


@pytest.fixture
def make_setting(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setting]:
    """Opens a link to a mailbox and a store, and starts a group; arguments are overrides of the recipe."""

    def go(*overrides: str, mailbox: type[LearnerMailbox] = LearnerMailbox) -> Setting:
        setting = Setting(make_config(*overrides), mailbox)
        monkeypatch.setattr(module, "beside_the_driver", dict)
        monkeypatch.setattr(module, "start_actor", lambda role, cls, options, place: setting.handles[options["name"]])
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=setting.pause, Lock=asyncio.Lock))
        setting.link.open()
        setting.link.start(setting.group)
        return setting

    return go
