"""`python -m l2e_ds.train`, but on rank 1 something breaks at step 3."""

import sys

from l2e_ds import distributed, train
from l2e_ds.training import trainer

real = trainer.Trainer.train_step


def train_step(self):
    if distributed.rank() == 1 and self.state.step == 3:
        raise ZeroDivisionError("broken on purpose")
    return real(self)


if __name__ == "__main__":
    trainer.Trainer.train_step = train_step
    train.leave_process(train.main(sys.argv[1:]))
