#!/usr/bin/env python
"""Look at a run before it starts: ``python tools/preflight.py --config-file X.yaml --help``.

Trains nothing; exit status 0 if the run is ready, 1 if it is not, 2 for a mistake in the input.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("preflight"))
