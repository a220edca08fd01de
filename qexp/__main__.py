"""`python -m qexp ...` and `torchrun -m qexp ...` are the command `qexp ...`."""

import sys

from qexp.cli import main

sys.exit(main())
