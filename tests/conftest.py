"""What all tests share: one thread of torch in each process, so that workers share the cores."""

from __future__ import annotations

import os

from hypothesis import settings

# Matrices here are small, and threads that wait for a busy core cost seconds. It must be said
# before torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes is the machine's doing.
settings.register_profile("qplug", deadline=None)
settings.load_profile("qplug")
