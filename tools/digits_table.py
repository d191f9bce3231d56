#!/usr/bin/env python
"""Every detection loss on the digits, over several seeds, as one table.

python tools/digits_table.py --host detectron2 --arch mrcnn --jobs 2

Trains the teacher once, then every row with every seed (runs that are done are kept, interrupted
ones continue), and prints mean and sample standard deviation as Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"detectron2": "digits", "torchvision_detection": "digits_torchvision"}
ROWS = {
    "baseline": "student alone",
    "kd": "KD",
    "fitnet": "FitNet",
    "fgfi": "FGFI",
    "reviewkd": "ReviewKD",
    "reviewkd_kd": "ReviewKD + KD",
}
METRICS = {"box AP": "bbox/AP", "box AP50": "bbox/AP50", "mask AP": "segm/AP"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", choices=FOLDERS, default="torchvision_detection")
    parser.add_argument("--arch", choices=("frcnn", "mrcnn"), default="frcnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits_table"))
    args, overrides = parser.parse_known_args()
    runs = args.output / f"{args.host}_{args.arch}"
    folder = ROOT / "configs" / FOLDERS[args.host]
    teacher_config, teacher = folder / f"teacher_{args.arch}.yaml", runs / "teacher"
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        jobs = [(row, seed) for seed in args.seeds for row in args.rows]
        task = progress.add_task("teacher", total=len(jobs) + 1)
        train(teacher_config, teacher, [])
        progress.advance(task)
        progress.update(task, description="students")
        taught = [
            *("KD.TEACHER.CONFIG_FILE", str(teacher_config)),
            *("KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")),
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [
                pool.submit(
                    train,
                    folder / f"{row}_{args.arch}.yaml",
                    runs / f"{row}_seed{seed}",
                    ["SEED", str(seed), *taught, *overrides],
                )
                for row, seed in jobs
            ]
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
    print(table(runs, args.rows, args.seeds))
    return 0


def train(config: Path, output: Path, overrides: list[str]) -> None:
    """One run in a process of its own: a run's random numbers must not depend on others."""
    if last(output, "bbox/AP") is not None and (output / "model_final.pth").is_file():
        return
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config)]
    started = (output / "last_checkpoint").exists() or (output / "last.ckpt").exists()
    command += ["--resume"] if started else []
    output.mkdir(parents=True, exist_ok=True)
    with (output / "screen.txt").open("a") as screen:
        done = subprocess.run(
            [*command, *overrides, "OUTPUT_DIR", str(output)],
            stdout=screen,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{config.name} failed; see {output / 'screen.txt'}")


def last(output: Path, key: str) -> float | None:
    """The last value of a metric in a run's ``metrics.json``."""
    path = output / "metrics.json"
    lines = path.read_text().splitlines() if path.is_file() else []
    values = [record[key] for record in map(json.loads, lines) if key in record]
    return values[-1] if values else None


def table(runs: Path, rows: list[str], seeds: list[int]) -> str:
    """Markdown; the last column is the mean gain in box AP and whether it exceeds noise."""
    shown = {name: k for name, k in METRICS.items() if last(runs / "teacher", k) is not None}
    lines = [
        "| model | " + " | ".join(shown) + " | box AP gained |",
        "| --- |" + " ---: |" * (len(shown) + 1),
    ]
    baseline = values(runs, "baseline", seeds, "bbox/AP")
    for row in rows:
        cells = [spread(values(runs, row, seeds, key)) for key in shown.values()]
        gain = "" if row == "baseline" else gained(values(runs, row, seeds, "bbox/AP"), baseline)
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + f" | {gain} |")
    cells = [f"{last(runs / 'teacher', key):.2f}" for key in shown.values()]
    lines.append("| teacher (one run) | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def values(runs: Path, row: str, seeds: list[int], key: str) -> list[float]:
    found = [last(runs / f"{row}_seed{seed}", key) for seed in seeds]
    return [value for value in found if value is not None]


def spread(numbers: list[float]) -> str:
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{deviation}" if numbers else "-"


def gained(numbers: list[float], baseline: list[float]) -> str:
    if len(numbers) < 2 or len(baseline) < 2:
        return "-"
    difference = statistics.mean(numbers) - statistics.mean(baseline)
    # The larger of the two spreads: neither row may look steadier than the other.
    noise = max(statistics.stdev(numbers), statistics.stdev(baseline))
    verdict = "**more than 2 sd**" if difference > 2 * noise else "within noise"
    return f"{difference:+.2f} ({verdict})"


if __name__ == "__main__":
    sys.exit(main())
