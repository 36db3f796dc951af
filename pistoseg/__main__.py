"""`python -m pistoseg`."""

import sys

from pistoseg.cli import main

sys.exit(main())
