"""Guidance that follows what it earns (``sampler.guidance.control``).

The strength of an iteration is a function of the records of earlier iterations alone, so that a resumed run goes on
with the strength that an undisturbed one has. It looks back over the iterations that are surely trained when groups are
drawn for it: with a staleness of s, over those up to the (s + 1)-th before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from euphonium.config import GuidanceConfig

MARGIN, MARGIN_ERROR = "guidance/margin", "guidance/margin_error"


class GuidanceControl:
    """The strength of the guidance, iteration by iteration.

    Example:
        >>> from euphonium.config import GuidanceConfig
        >>> control = GuidanceControl(None, max_staleness=0)
        >>> control.strength(5)
        1.0
        >>> guidance = GuidanceConfig(scale=2.0, strengths=(0, 1), control={"highest": 4})
        >>> control = GuidanceControl(guidance, max_staleness=0)
        >>> for number, margin in enumerate([0.5, 0.5, -0.1], start=1):
        ...     _ = control.observe(number, {"guidance/margin": margin, "guidance/margin_error": 0.2})
        >>> [control.strength(iteration) for iteration in range(4)]
        [1.0, 1.25, 1.5625, 1.25]
    """

    def __init__(
        self, guidance: GuidanceConfig | None, max_staleness: int, records: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Starts with the records of a resumed run.

        Args:
            guidance: the recipe's guidance.
            max_staleness: versions by which drawing may run ahead of training.
            records: metrics that the run has recorded so far.
        """
        self._control = None if guidance is None else guidance.control
        self._staleness = max_staleness
        self._measured = {int(r["iteration"]): (r[MARGIN], r[MARGIN_ERROR]) for r in records if MARGIN in r}

    def strength(self, iteration: int) -> float:
        """Multiple of the recipe's guidance for an iteration (from 0)."""
        strength, control = 1.0, self._control
        if control is None:
            return strength
        for number, (margin, error) in sorted(self._measured.items()):
            if number > iteration - self._staleness:
                break
            if margin > control.confidence * error:
                strength = min(strength * control.raise_by, control.highest)
            elif margin < 0:
                strength = max(strength * control.lower_by, control.lowest)
        return strength

    def observe(self, number: int, statistics: Mapping[str, float]) -> dict[str, float]:
        """Takes what an iteration (from 1) showed, anew where it is done again; returns the strength it had."""
        if self._control is None:
            return {}
        if MARGIN in statistics:
            self._measured[number] = (statistics[MARGIN], statistics[MARGIN_ERROR])
        return {"guidance/strength": self.strength(number - 1)}
