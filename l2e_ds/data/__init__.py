"""From text or token files to the sequences of every step."""

from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.mixture import TrainingSequences, check_sets, check_texts, prepare_sets, prepare_texts
from l2e_ds.data.prepare import PreparedData, PreparedText, check_data, prepare_data, tokenizer_of

__all__ = [
    "PreparedData",
    "PreparedText",
    "TokenDataset",
    "TrainingSequences",
    "check_data",
    "check_sets",
    "check_texts",
    "prepare_data",
    "prepare_sets",
    "prepare_texts",
    "tokenizer_of",
]
