"""Pure tensor mathematics of the samplers and of group-relative policy optimisation; imports torch only."""

from dynamics.advantages import AdvantageRule, Advantages, GroupRewards, group_advantages
from dynamics.schedules import shifted_sigmas
from dynamics.step_table import LAWS, Guidance, StepTable, StepTableError

__all__ = [
    "LAWS",
    "AdvantageRule",
    "Advantages",
    "GroupRewards",
    "Guidance",
    "StepTable",
    "StepTableError",
    "group_advantages",
    "shifted_sigmas",
]
