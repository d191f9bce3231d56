#!/usr/bin/env python
"""Pictures of what is distilled: ``python tools/visualize.py --config-file X.yaml --help``.

Maps, attention, masks, RoIs, graphs and logits of teacher and student, on every host.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("visualize"))
