"""`python -m hf_warmstart.growth.layouts`: see `regenerate`."""

import sys

from .regenerate import main

if __name__ == "__main__":
    sys.exit(main())
