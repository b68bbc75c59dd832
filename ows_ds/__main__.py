"""`python -m ows_ds VERB` is `ows-ds VERB`."""

import sys

from ows_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
