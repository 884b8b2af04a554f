"""Builds the parts of a training step from a run's configuration."""

from __future__ import annotations

from l2e_ds.config.sections import RunConfig
from l2e_ds.inhibition import Settings


def inhibition_settings(config: RunConfig) -> Settings:
    """The method's settings as the run file's section `inhibition` gives them."""
    section = config.inhibition
    retrieval, mechanism = section.parts
    return Settings(
        retrieval=retrieval,
        mechanism=mechanism,
        loss=section.loss,
        power=section.power,
        target_share=section.target_share,
        strength=section.strength,
        coefficient=section.coefficient,
        start=section.start,
        warmup=section.warmup,
        decay=section.decay,
        end=section.end,
        statistics_window=None if isinstance(section.statistics_window, str) else section.statistics_window,
        reduce=section.reduce,
        fused=None if section.fused == "auto" else section.fused,
    )
