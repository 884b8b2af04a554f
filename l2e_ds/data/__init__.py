"""From text or token files to the sequences of every step."""

from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.prepare import PreparedData, check_data, prepare_data
from l2e_ds.data.sampler import GlobalBatchSampler

__all__ = ["GlobalBatchSampler", "PreparedData", "TokenDataset", "check_data", "prepare_data"]
