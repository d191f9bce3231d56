#!/usr/bin/env python
"""Every method on the digits, over several seeds, as one table.

python tools/digits_table.py --host detectron2 --arch mrcnn --jobs 2
python tools/digits_table.py --host classification --seeds 1 2 3 4 5

Trains the teacher once, then every row with every seed (runs that are done are kept, interrupted
ones continue), and prints mean and sample standard deviation as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd_det.report.stats import gain, spread
from kd_det.run.json_lines import read_json_lines

ROOT = Path(__file__).resolve().parents[1]
DETECTION = {
    "baseline": "student alone",
    "kd": "KD",
    "fitnet": "FitNet",
    "fgfi": "FGFI",
    "reviewkd": "ReviewKD",
    "reviewkd_kd": "ReviewKD + KD",
}
# On detectors these are run only if --rows names them: they double the time.
FURTHER = {
    "at": "AT",
    "fsp": "FSP, two stages",
    "irg": "IRG",
    "mhgd": "MHGD",
    "kcd": "KCD (with KD)",
}
CLASSIFICATION = {
    "baseline": "student alone",
    "kd": "KD",
    "fitnet": "FitNet",
    "fitnet_stages": "FitNet, two stages",
    "at": "AT",
    "fsp": "FSP, two stages",
    "rocket": "Rocket",
    "reviewkd": "ReviewKD",
    "irg": "IRG",
    "mtk": "IRG, full (MTK)",
    "mhgd": "MHGD",
    "kcd": "KCD (with KD)",
    "unix": "UNIX (with KD)",
}
AP = {"box AP": "bbox/AP", "box AP50": "bbox/AP50", "mask AP": "segm/AP"}
ACCURACY = {
    "accuracy, last": "accuracy/top1",
    "best": "accuracy/top1_best",
    "cost %": "cost/measured",
}


@dataclass(frozen=True)
class Study:
    """What is compared on one host. A gain counts beyond ``deviations`` standard deviations."""

    folder: str
    rows: dict[str, str]
    default: tuple[str, ...]
    metrics: dict[str, str]
    deviations: int


STUDIES = {
    "detectron2": Study("digits", DETECTION | FURTHER, tuple(DETECTION), AP, 2),
    "torchvision_detection": Study(
        "digits_torchvision", DETECTION | FURTHER, tuple(DETECTION), AP, 2
    ),
    "classification": Study(
        "classification/digits", CLASSIFICATION, tuple(CLASSIFICATION), ACCURACY, 1
    ),
}


def endings(host: str, arch: str) -> tuple[str, str, str]:
    """Ends of the names of the configs of teacher, baseline and rows."""
    if host == "classification":
        return "resnet20", "resnet14_x0.5", "resnet14_x0.5_resnet20"
    return arch, arch, arch


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", choices=STUDIES, default="torchvision_detection")
    parser.add_argument("--arch", choices=("frcnn", "mrcnn"), default="frcnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", help="default: those of docs/results")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits_table"))
    args, overrides = parser.parse_known_args()
    study = STUDIES[args.host]
    if unknown := set(args.rows or ()) - set(study.rows):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known: {', '.join(study.rows)}")
    chosen = args.rows or list(study.default)
    teacher_end, baseline_end, row_end = endings(args.host, args.arch)
    runs = args.output / (
        args.host if args.host == "classification" else f"{args.host}_{args.arch}"
    )
    folder = ROOT / "configs" / study.folder
    teacher_config, teacher = folder / f"teacher_{teacher_end}.yaml", runs / "teacher"
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        jobs = [(row, seed) for seed in args.seeds for row in chosen]
        task = progress.add_task("teacher", total=len(jobs) + 1)
        train(teacher_config, teacher, [])
        progress.advance(task)
        progress.update(task, description="students")
        teacher_opts = [
            *("KD.TEACHER.CONFIG_FILE", str(teacher_config)),
            *("KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")),
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [
                pool.submit(
                    train,
                    folder / f"{row}_{baseline_end if row == 'baseline' else row_end}.yaml",
                    runs / f"{row}_seed{seed}",
                    ["SEED", str(seed), *teacher_opts, *overrides],
                )
                for row, seed in jobs
            ]
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
    print(table(study, runs, chosen, args.seeds))
    return 0


def train(config: Path, output: Path, overrides: list[str]) -> None:
    """One run in a process of its own: a run's random numbers must not depend on others."""
    done = any(last(output, key) is not None for key in ("bbox/AP", "accuracy/top1"))
    if done and (output / "model_final.pth").is_file():
        return
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config)]
    started = [p for name in ("last_checkpoint", "last.ckpt") for p in output.rglob(name)]
    command += ["--resume"] if started else []
    output.mkdir(parents=True, exist_ok=True)
    with (output / "screen.txt").open("a") as screen:
        finished = subprocess.run(
            [*command, *overrides, "OUTPUT_DIR", str(output)],
            stdout=screen,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if finished.returncode:
        raise SystemExit(f"{config.name} failed; see {output / 'screen.txt'}")


def last(output: Path, key: str) -> float | None:
    """A metric of a run that is done, from its results or the end of its curves."""
    kind, _, name = key.partition("/")
    results = output / "results.json"
    if results.is_file():
        return json.loads(results.read_text()).get(kind, {}).get(name)
    path = output / "metrics.json"
    lines = read_json_lines(path) if path.is_file() else []
    values = [record[key] for record in lines if key in record]
    return values[-1] if values else None


def table(study: Study, runs: Path, rows: list[str], seeds: list[int]) -> str:
    """Markdown; the last column is the mean gain in the first metric and whether it counts."""
    folders = [runs / "teacher", *(runs / f"{row}_seed{seeds[0]}" for row in rows)]
    shown = {
        name: key
        for name, key in study.metrics.items()
        if any(last(folder, key) is not None for folder in folders)
    }
    main = next(iter(shown.values()))
    lines = [
        "| model | " + " | ".join(shown) + " | gained |",
        "| --- |" + " ---: |" * (len(shown) + 1),
    ]
    baseline = values(runs, "baseline", seeds, main)
    for row in rows:
        cells = [spread(values(runs, row, seeds, key)) for key in shown.values()]
        numbers = values(runs, row, seeds, main)
        gain = "" if row == "baseline" else gained(numbers, baseline, study.deviations)
        lines.append(f"| {study.rows[row]} | " + " | ".join(cells) + f" | {gain} |")
    cells = [
        spread([v for v in [last(runs / "teacher", key)] if v is not None])
        for key in shown.values()
    ]
    lines.append("| teacher (one run) | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def values(runs: Path, row: str, seeds: list[int], key: str) -> list[float]:
    results = [last(runs / f"{row}_seed{seed}", key) for seed in seeds]
    return [value for value in results if value is not None]


def gained(numbers: list[float], baseline: list[float], deviations: int) -> str:
    difference = gain(numbers, baseline, deviations)
    if difference is None or difference.noise is None:
        return "-"
    verdict = f"**{difference.verdict}**" if difference.counts else difference.verdict
    return f"{difference.difference:+.2f} ({verdict})"


if __name__ == "__main__":
    sys.exit(main())
