#!/usr/bin/env python
"""Strip a distilled checkpoint to the stock student.

python tools/export_student.py --config-file outputs/run/config.yaml \\
    --weights outputs/run/model_final.pth --output outputs/run/student
"""

import argparse
import importlib
import sys

from kd_det.core.errors import KDError
from kd_det.hosts.base import load_config


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the run's config.yaml, or its config")
    parser.add_argument("--weights", required=True, help="the run's checkpoint")
    parser.add_argument("--output", required=True, help="folder for model.pth and config.yaml")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, args.opts)
        host = importlib.import_module(f"kd_det.hosts.{cfg.HOST}.export")
        model, config = host.export_student(cfg, args.weights, args.output)
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"student weights: {model}\nstudent config:  {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
