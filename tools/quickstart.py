#!/usr/bin/env python
"""A small detector learns from a large one: ``python tools/quickstart.py [--host detectron2]``.

Real images, three trainings, a table and two pictures, in minutes; ``make quickstart`` calls it.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("quickstart"))
