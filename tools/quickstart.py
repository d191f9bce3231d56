#!/usr/bin/env python
"""A small detector learns from a large one, on real images, in minutes: ``make quickstart``."""

import argparse
import sys
from pathlib import Path

from kd_det.core.errors import KDError
from kd_det.hosts.base import require_detectron2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--host", default="torchvision_detection", choices=("torchvision_detection", "detectron2")
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    try:
        if args.host == "detectron2":
            require_detectron2()
        from kd_det.app.quickstart.run import quickstart

        quickstart(args.host, args.output, args.opts)
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning answers the first by the second
        print("\nInterrupted; the same command continues where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
