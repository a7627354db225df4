"""The environment of all tests, set before anything is loaded that reads it."""

import os

# Torch, also of the services that tests start: on models this small, and beside another worker, threads only get in
# each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# Triton, which torch loads: kernels are interpreted, on a CPU.
os.environ["TRITON_INTERPRET"] = "1"
