"""``python -m itemkit.cli``: the command line where no script is installed."""

import sys

from itemkit.cli import main

sys.exit(main())
