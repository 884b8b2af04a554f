"""`python -m l2e_ds.slurm`, which batch scripts call."""

import sys

from l2e_ds.slurm.job import main

sys.exit(main())
