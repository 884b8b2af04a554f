"""The method, on its own: nothing here knows of DeepSpeed, transformers or run files."""

from l2e_ds.inhibition.hook import Inhibitor, NeuronSite
from l2e_ds.inhibition.settings import Settings

__all__ = ["Inhibitor", "NeuronSite", "Settings"]
