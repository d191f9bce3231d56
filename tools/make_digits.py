#!/usr/bin/env python
"""Write the digits data set in COCO format, with a contact sheet of what is in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd_det.core.errors import KDError
from kd_det.data.digits.contact_sheet import draw_contact_sheet
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.data.subset_json import write_subset

Paths = dict[str, tuple[Path, Path]]


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
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="DIGIT",
        help="also write annotations of these classes alone, in this order; all ten permute them",
    )
    parser.add_argument("--name", help="of the data set of --classes (default: digits<classes>)")
    return parser.parse_args(argv)


def subset(paths: Paths, classes: list[str], name: str | None) -> Paths:
    """The data set of some classes: its own annotations, the same images."""
    name, subsets = name or f"digits{''.join(classes)}", {}
    for whole, (json_file, image_root) in paths.items():
        split = f"{name}_{whole.removeprefix('digits_')}"
        subsets[split] = (
            write_subset(json_file, json_file.with_name(f"{split}.json"), classes),
            image_root,
        )
    return subsets


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
        sheet = draw_contact_sheet(*paths["digits_train"], args.output / "contact_sheet.png")
        if args.classes:
            paths = subset(paths, args.classes, args.name)
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
