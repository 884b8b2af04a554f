"""Pretrain language models while inhibiting their most monosemantic neurons (L2E), on DeepSpeed."""

TYPE_CHECKING = False  # stands for typing's, whose import would cost time: every command starts with this file
if TYPE_CHECKING:
    from l2e_ds.hf_trainer import InhibitionCallback
    from l2e_ds.inhibition import Inhibitor, NeuronSite, Settings
    from l2e_ds.models.sites import neuron_sites

__version__ = "0.1.0"
__all__ = ["InhibitionCallback", "Inhibitor", "NeuronSite", "Settings", "__version__", "neuron_sites"]

# The Python API (docs/python-api.md): imported when it is asked for, so that the package itself needs no torch.
_HOMES = dict.fromkeys(("Inhibitor", "NeuronSite", "Settings"), "l2e_ds.inhibition")
_HOMES |= {"InhibitionCallback": "l2e_ds.hf_trainer", "neuron_sites": "l2e_ds.models.sites"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
