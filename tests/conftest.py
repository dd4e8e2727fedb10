"""For all tests."""

from __future__ import annotations

import os

# Tests run side by side, on networks so small that a second thread costs more than it brings. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
