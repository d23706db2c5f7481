"""One hierarchy of errors, each with the exit status that the command line ends with.

A message names what failed, where (role, node, file, field) and what to do next: it is the last thing that a user
sees of a run, also in the Ray dashboard.
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
    """Resources that a pool asked for never came."""

    exit_status = 4


class TrainingError(EuphoniumError):
    """The run cannot go on: a role died for good, or its numbers are wrong."""

    exit_status = 5


class LostActorError(TrainingError):
    """An actor or an object that is gone: asking again, or somebody else, may help."""


class LateError(LostActorError):
    """An answer that did not come in time: whoever was asked hangs, or has too much to do; another one may do."""


class WeightsMissingError(TrainingError):
    """The weight store does not have the weights that were asked for: they must be published again."""


class RewardError(TrainingError):
    """A reward that could not be had: the server is gone, too slow, or answered something that is no number.

    Attributes:
        rewards: names of the rewards that could not be had, as in the metrics; decides whose ``on_failure`` applies.
    """

    def __init__(self, message: str, rewards: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.rewards = tuple(rewards)


class NonFiniteRewardError(RewardError):
    """A reward or gradient that is no finite number. It belongs to the sample, so that asking again is no use."""


class CheckpointError(EuphoniumError):
    """A checkpoint that is missing, damaged, or of another kind of run."""

    exit_status = 6
