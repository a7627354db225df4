"""How a trainer's process ends, for a Job to act upon."""

import signal

# Of a process for one run: trying again does not help.
FAILED = 3
# Another rank died; it is to blame, and says how in its own status.
RANK_LOST = 4
# Told to stop; the run was given back.
STOPPED = 128 + signal.SIGTERM
