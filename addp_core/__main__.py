"""`python -m addp_core <verb> ...`: the command line for torchrun and for a source tree that is not installed."""

import sys

from addp_core.recipes.cli import main

sys.exit(main())
