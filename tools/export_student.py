#!/usr/bin/env python
"""Strip a distilled checkpoint to the stock student: ``python tools/export_student.py --help``.

Its keys and its config are those of the library that the student comes from.
"""

import sys

from kd_det.app.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("export"))
