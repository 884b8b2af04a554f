"""Inhibit monosemantic neurons in any PyTorch loop; nothing here knows of DeepSpeed, transformers or run files."""

from l2e_ds.inhibition.inhibitor import Inhibitor
from l2e_ds.inhibition.settings import NeuronSite, Settings

__all__ = ["Inhibitor", "NeuronSite", "Settings"]
