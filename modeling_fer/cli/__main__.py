"""`python -m modeling_fer.cli`."""

import sys

from modeling_fer.cli import main

if __name__ == "__main__":
    sys.exit(main())
