"""``python -m itemkit`` is the same as ``itemkit``."""

import sys

from itemkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
