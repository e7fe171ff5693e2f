"""`python -m flowtilt`, which torchrun needs."""

import sys

from flowtilt.cli import main

if __name__ == "__main__":
    sys.exit(main())
