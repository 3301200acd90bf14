"""`python -m addp_core <verb> ...`, for torchrun and for a source tree that is not installed."""

import sys

from addp_core.recipes.cli import main

sys.exit(main())
