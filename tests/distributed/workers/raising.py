"""`python -m l2e_ds.train`, but on rank 1 something breaks at step 3."""

import sys

from l2e_ds import train
from l2e_ds.distributed import collectives
from l2e_ds.system import process
from l2e_ds.training import trainer

real = trainer.Trainer.train_step


def train_step(self):
    if collectives.rank() == 1 and self.state.step == 3:
        raise ZeroDivisionError("broken on purpose")
    return real(self)


if __name__ == "__main__":
    trainer.Trainer.train_step = train_step
    process.leave_process(train.main(sys.argv[1:]))
