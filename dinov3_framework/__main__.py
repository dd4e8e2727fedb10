"""``python -m dinov3_framework`` is ``dinov3-run``."""

import os
import sys

from dinov3_framework.cli import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # one process of a job
        from dinov3_framework.runtime.processes import leave

        leave(code)
    sys.exit(code)
