"""``python -m itemkit.notebooks``."""

import sys

from itemkit.notebooks import main

sys.exit(main())
