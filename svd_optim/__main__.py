"""``python -m svd_optim``: see :mod:`svd_optim.console.commands`."""

import sys

from .console.commands import main

if __name__ == "__main__":
    sys.exit(main())
