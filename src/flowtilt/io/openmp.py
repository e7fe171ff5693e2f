"""How threads of OpenMP wait for each other: they spin for a moment, then sleep.

torch computes with OpenMP threads that meet after every small operation. The thread that comes first spins by default. Where other
programs use the same cores, it spins on the core that the late thread needs. Sleeping at once is no cure: each wake-up then waits behind
the other program. Both made rollouts 4 to 35 times slower beside two busy programs on two cores; a short spin 1.6 to 2.2 times, the fair
share being 2 (benchmarks/busy.py). The runtime reads its environment once, when torch is loaded.
"""

import os
import sys

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user chooses: OpenMP's own, GNU's (torch on Linux), Intel's and LLVM's (torch on Windows and macOS)."""


SPINS = "1000"
"""A few microseconds, as long as most threads are late. 10,000 are faster on an idle machine, and three times slower on a busy one."""


def spin_briefly() -> None:
    """Sets how long threads spin; does nothing once torch is loaded, or where the user has set one of `CHOICES`.

    GNU's runtime takes GOMP_SPINCOUNT; the others know no such number and sleep at once.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS}
