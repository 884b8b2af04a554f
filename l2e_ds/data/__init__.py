"""From text or token files to the sequences of every step."""

from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.mixture import TrainingSequences, check_sets, prepare_sets
from l2e_ds.data.prepare import PreparedData, check_data, prepare_data

__all__ = [
    "PreparedData",
    "TokenDataset",
    "TrainingSequences",
    "check_data",
    "check_sets",
    "prepare_data",
    "prepare_sets",
]
