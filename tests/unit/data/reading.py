"""What token files hold, as lists."""

from itertools import pairwise

import numpy as np

from l2e_ds.data.indexed import IndexedTokens


def documents_in(indexed: IndexedTokens) -> list[list[int]]:
    """Return the token ids of each document of a set."""
    starts = indexed.starts(np.arange(indexed.num_documents + 1)).tolist()
    return [indexed.tokens[start:stop].tolist() for start, stop in pairwise(starts)]
