#!/usr/bin/env python
"""Train or evaluate: ``python tools/train_net.py --config-file X.yaml [--num-gpus N] [KEY VALUE]``.

Runs every host, and under ``torchrun`` too.
"""

import sys

from kd_det.app.train import main

if __name__ == "__main__":
    sys.exit(main())
