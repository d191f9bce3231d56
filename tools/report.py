#!/usr/bin/env python
"""What a distillation bought: ``python tools/report.py RUN ... --baseline RUN ... --teacher RUN``.

One HTML page and the same as Markdown, from what runs leave on disk, on every host.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("report"))
