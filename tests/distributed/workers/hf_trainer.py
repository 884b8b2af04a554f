"""The Hugging Face Trainer with `InhibitionCallback` on several ranks (DDP); rank 0 writes what it had.

hf_trainer.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

from tests.unit.test_hf_trainer import sequences, train

folder = Path(sys.argv[1])
ranks = int(os.environ["WORLD_SIZE"])
for name, changes in {"mean": {}, "own": {"average_tokens_across_devices": False}, "padded": {}}.items():
    rows = sequences(32, padded=name == "padded")
    notes, callback, _ = train(folder / name, rows, accumulation=2, batch=8 // ranks, **changes)
    if os.environ["RANK"] == "0":
        torch.save((notes.gradients, callback.inhibitor.state_dict()), folder / f"{name}.pt")
torch.distributed.destroy_process_group()
