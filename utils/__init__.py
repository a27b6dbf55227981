"""Configuration, registry, run folders, randomness, images: what everything else stands on."""

import os

# Read when torch loads its OpenMP library. Threads that wait then sleep instead of spinning; with spinning threads,
# small networks ran 25 times slower on two cores of which another program used one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
