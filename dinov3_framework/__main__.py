"""``python -m dinov3_framework`` is ``dinov3-run``."""

import sys

from dinov3_framework.cli import main

if __name__ == "__main__":
    sys.exit(main())
