#!/usr/bin/env python
"""Train or evaluate: ``python tools/train_net.py --config-file X.yaml [--num-gpus N] [KEY VALUE]``.

Runs every host, and under ``torchrun`` too.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train"))
