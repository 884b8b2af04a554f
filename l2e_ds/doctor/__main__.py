"""`python -m l2e_ds.doctor`, which a launcher starts as one of several ranks."""

from l2e_ds.doctor.command import main
from l2e_ds.system.process import leave_process

leave_process(main())
