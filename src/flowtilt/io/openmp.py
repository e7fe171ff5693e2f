"""How threads of OpenMP wait for each other: asleep, not spinning.

torch computes with OpenMP threads that meet after every small operation. The thread that comes first spins by default. Where other
programs use the same cores, it spins on the core that the late thread needs, and training becomes 10 to 30 times slower.
The runtime reads its environment once, when torch is loaded.
"""

import os
import sys

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user chooses: OpenMP's own, GNU's (torch on Linux), Intel's and LLVM's (torch on Windows and macOS)."""


def wait_asleep() -> None:
    """Sets OMP_WAIT_POLICY=passive; does nothing once torch is loaded, or where the user has set one of `CHOICES`."""
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
