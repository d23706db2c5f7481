"""The errors that the application raises on purpose, each with the command line's exit status.

A message names what failed, where (role, node, file, field) and what to do next: it is the last thing that a user
sees of a run, on the terminal and in the Ray dashboard.
"""

from __future__ import annotations

from collections.abc import Sequence


class EuphoniumError(Exception):
    """Base of all errors that the application raises on purpose."""

    exit_status = 1


class ConfigError(EuphoniumError):
    """A recipe, override or input file that cannot be used; nothing has been started."""

    exit_status = 2


class PreflightError(EuphoniumError):
    """The machine or cluster cannot run this recipe."""

    exit_status = 3


class ResourcesError(EuphoniumError):
    """The resources that a pool reserves did not become available in time."""

    exit_status = 4


class TrainingError(EuphoniumError):
    """The run cannot go on: a role died for good, or its numbers are wrong."""

    exit_status = 5


class LostActorError(TrainingError):
    """An actor or object is gone; trying again, or with another actor, may help."""


class LateError(LostActorError):
    """An answer did not come in time: the actor hangs or is overloaded; another one may answer."""


class WeightsMissingError(TrainingError):
    """The weight store does not have the requested weights; they must be published again."""


class RewardError(TrainingError):
    """A reward could not be computed: its server is gone, too slow, or failed.

    Attributes:
        rewards: names of the failed rewards, as in the metrics; their ``on_failure`` settings apply.
    """

    def __init__(self, message: str, rewards: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.rewards = tuple(rewards)


class NonFiniteRewardError(RewardError):
    """A reward or gradient is not finite. That is a property of the sample, so the request is not retried."""


class CheckpointError(EuphoniumError):
    """A checkpoint is missing or damaged, belongs to another run, or could not be written."""

    exit_status = 6
