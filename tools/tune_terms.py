#!/usr/bin/env python
"""Search loss weights: ``python tools/tune_terms.py --config-file X.yaml --keys KEY ... --help``.

One key after the other, each with the best values of those before, on every host.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("tune"))
