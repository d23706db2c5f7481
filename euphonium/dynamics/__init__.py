"""Mathematics of samplers and of group-relative policy optimisation: pure functions of tensors, on torch alone."""

from euphonium.dynamics.advantages import AdvantageRule, Advantages, GroupRewards, group_advantages
from euphonium.dynamics.guidance import Guidance
from euphonium.dynamics.laws import LAWS, StepTableError
from euphonium.dynamics.schedules import noised, shift_sigma, shifted_sigmas
from euphonium.dynamics.step_table import StepTable

__all__ = [
    "LAWS",
    "AdvantageRule",
    "Advantages",
    "GroupRewards",
    "Guidance",
    "StepTable",
    "StepTableError",
    "group_advantages",
    "noised",
    "shift_sigma",
    "shifted_sigmas",
]
