"""`python -m l2e_ds.supervise`, which batch scripts and launch/ call."""

import sys

from l2e_ds.supervise.supervisor import main

sys.exit(main())
