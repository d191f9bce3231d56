#!/usr/bin/env python
"""Write the digits data set in COCO format, with a contact sheet of what is in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd_det.checks import KDError
from kd_det.data.digits import DigitsSpec, contact_sheet, write_digits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    defaults = DigitsSpec()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("datasets/digits"), help="folder to write"
    )
    parser.add_argument(
        "--train-images", type=int, default=defaults.train_images, help="training images"
    )
    parser.add_argument(
        "--val-images", type=int, default=defaults.val_images, help="validation images"
    )
    parser.add_argument(
        "--canvas", type=int, default=defaults.canvas, help="height and width of images in pixels"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="what all depends on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        spec = DigitsSpec(
            canvas=args.canvas,
            train_images=args.train_images,
            val_images=args.val_images,
            seed=args.seed,
        )
        with Progress(*columns) as progress:
            task = progress.add_task("digits", total=spec.train_images + spec.val_images)
            paths = write_digits(
                args.output, spec, lambda done, _: progress.update(task, completed=done)
            )
            # A data set that was there already is reused without a single call.
            progress.update(task, completed=spec.train_images + spec.val_images)
        sheet = contact_sheet(args.output, "train", args.output / "contact_sheet.png")
    except KDError as error:
        sys.exit(f"error: {error}")
    for name, (json_file, image_root) in paths.items():
        print(f"{name}: {json_file}, images in {image_root}")
    print(f"contact sheet: {sheet}\n\nto train on it, add to a config:\n")
    print("DATASETS:\n  COCO_JSON:")
    for name, (json_file, image_root) in paths.items():
        print(f"    {name}: [{json_file}, {image_root}]")


if __name__ == "__main__":
    main()
