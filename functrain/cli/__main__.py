"""`python -m functrain.cli`."""

import sys

from functrain.cli import main

sys.exit(main())
