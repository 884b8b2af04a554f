"""Which GPUs ranks are found to have; the groups themselves are joined in tests/distributed."""

import pytest

from l2e_ds.distributed.process_group import check_own_gpus
from l2e_ds.errors import ConfigError


def test_every_rank_has_its_own_gpu():
    """All of a host's GPUs are visible to each rank, or one to each; parts of one GPU (MIG) are GPUs of their own."""
    check_own_gpus([("a", "GPU-1", "None 0"), ("a", "GPU-2", "None 1"), ("b", "GPU-3", "None 0")])
    check_own_gpus([("a", "GPU-1", "0 0"), ("a", "GPU-2", "0 0")])
    check_own_gpus([("a", "GPU-1", "MIG-1 0"), ("a", "GPU-1", "MIG-2 0")])


def test_two_ranks_on_one_gpu_are_refused():
    with pytest.raises(ConfigError, match="ranks 1 and 2 have the same GPU of a"):
        check_own_gpus([("a", "GPU-1", "0,1 0"), ("a", "GPU-2", "0,1 1"), ("a", "GPU-2", "0,1 1")])
