"""Build what a training step needs from a run's configuration: network, hooks, loss head and engine.

Shapes: B sequences per micro-batch, T tokens per sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2e_ds.config.sections import RunConfig
from l2e_ds.engine.configuration import zero_stage
from l2e_ds.engine.engine import build_engine
from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.models.network import build_network
from l2e_ds.models.sites import neuron_sites
from l2e_ds.system.determinism import allow_deterministic_products
from l2e_ds.training.loss import LossHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TrainingStack:
    """Holds a network and everything that trains it, on one rank.

    sites: the neurons of the layers in `inhibition.layers`. inhibitor: attached to them, or None with
    `inhibition.method: none`. engine: the DeepSpeedEngine around `model`.
    """

    def __init__(self, config: RunConfig, ds: dict, hf_config: PretrainedConfig, device: torch.device) -> None:
        """Build everything, with the network's initial weights. Collective.

        hf_config: the Hugging Face configuration of the model; ds: the resolved DeepSpeed configuration. Raises
        ConfigError for layers that the network does not have or a CUBLAS_WORKSPACE_CONFIG that `training.deterministic`
        does not allow, and ValueError for a schedule that does not fit into the run.
        """
        if config.training.deterministic:
            allow_deterministic_products()
        self.model = build_network(config.model, hf_config, config.training.seed, ds if zero_stage(ds) == 3 else None)
        self.sites = neuron_sites(self.model, config.inhibition.layers)
        self.inhibitor: Inhibitor | None = None
        if config.inhibition.method != "none":
            self.inhibitor = Inhibitor(self.sites, inhibition_settings(config), device, run_steps=config.training.steps)
            self.inhibitor.attach()  # before the engine is built, as ZeRO-3 requires
        self.head = LossHead(self.model, config.training.z_loss)
        self.engine = build_engine(self.model, config, ds)


def forward_and_backward(
    engine: Any, head: LossHead, inhibitor: Inhibitor | None, micro_batch: Tensor, is_last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run a micro-batch, [B, T+1] int64, forward and backward; return its LM loss and z-loss, as `LossHead.loss`."""
    lm_loss, z_loss = head.loss(engine, micro_batch[:, :-1], micro_batch[:, 1:])
    engine.backward(lm_loss if inhibitor is None else inhibitor.attach_loss(lm_loss, is_last=is_last))
    return lm_loss, z_loss


def inhibition_settings(config: RunConfig) -> Settings:
    """Return the method's settings from the section `inhibition` of the run file. Raises ValueError."""
    section = config.inhibition
    retrieval, mechanism = section.retrieval_and_mechanism
    alike = ("loss", "power", "target_share", "strength", "coefficient", "start", "warmup", "decay", "end", "reduce")
    values: dict[str, Any] = {key: getattr(section, key) for key in alike}
    values["statistics_window"] = None if section.statistics_window == "cumulative" else section.statistics_window
    values["fused"] = None if section.fused == "auto" else section.fused
    return Settings(retrieval=retrieval, mechanism=mechanism, **values)
