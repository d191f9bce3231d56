#!/usr/bin/env python
"""Time of one training iteration with each loss, as ratios to KD measured side by side.

python tools/benchmark_losses.py --device cpu --threads 1

The setting of table 1 in IRG's supplement: CIFAR networks, batch 64. All methods take turns in
every round, so that whatever else the machine does hits all of them; a ratio is the median over
rounds of a method's time divided by KD's in the same round.
"""

import argparse
import platform
import statistics
import sys
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.utils.benchmark import Timer

from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.classification.model import Distillation, DistilledClassifier, Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.procedures.joint import Booster
from kd_det.procedures.pre_stage import pre_stage_losses

FIRST_AND_LAST = [f"stage{k}{part}" for k in (1, 2, 3) for part in ("_first", "")]
STAGES = ["stage1", "stage2", "stage3"]
EDGES = [["stage3", "stage3"], ["stage2", "stage3"], ["stage1", "stage3"]]
TERMS: dict[str, dict[str, Any]] = {
    "KD": {"LOSS": "KD", "TAPS": ["logits"], "TEMPERATURE": 4.0},
    "FSP": {"LOSS": "FSP", "TAPS": FIRST_AND_LAST},
    "AT": {"LOSS": "AT", "WEIGHT": 1000.0, "TAPS": STAGES},
    "Rocket": {"LOSS": "Rocket", "WEIGHT": 0.03, "TAPS": ["logits"]},
    "IRG": {"LOSS": "IRG", "TAPS": ["logits", *EDGES]},
    "MTK": {"LOSS": "MTK", "TAPS": ["logits", *EDGES, *FIRST_AND_LAST], "EDGES": 3},
    "MHGD": {"LOSS": "MHGD", "TAPS": STAGES},
    "ReviewKD": {"LOSS": "ReviewKD", "TAPS": STAGES},
}
# CIFAR column of the supplement's table, in ms.
PUBLISHED = {"KD": 50, "FSP": 302, "AT": 74, "Rocket": 51, "IRG": 190, "MTK": 205}
PLAIN = Statistics([0.5] * 3, [0.25] * 3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="resnet20_x0.5")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=2, help="of each method in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(args.batch, 3, 32, 32, device=args.device)
    targets = torch.randint(100, (args.batch,), device=args.device)
    steps = {name: Step(distilled(name, args), images, targets) for name in TERMS}
    steps["Rocket, joint"] = Step(joint(args), images, targets)
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=args.threads)
        for name, step in steps.items()
    }
    for timer in timers.values():
        timer.timeit(2)
    rounds = [
        {name: timer.timeit(args.iterations).mean for name, timer in timers.items()}
        for _ in track(range(args.rounds), "rounds")
    ]
    print(table(rounds))
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(
        f"\n{args.student} from {args.teacher}, batch {args.batch}, {args.rounds} rounds of "
        f"{args.iterations} iterations, {args.threads} thread(s), torch {torch.__version__}, "
        f"{args.device} {where}"
    )
    return 0


class Step:
    """One iteration: forward of both models, losses, backward, update."""

    def __init__(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.model = model.to(images.device).train()
        self.batch = (images, targets)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(self.model(*self.batch).values())).sum().backward()
        self.optimizer.step()


def distilled(name: str, args: argparse.Namespace) -> DistilledClassifier:
    student, teacher = (build_classifier(n, 100) for n in (args.student, args.teacher))
    term = dict(TERMS[name])
    if name == "FSP" and args.student != args.teacher:
        term["ADAPT"] = True  # other widths need a 1x1 convolution
    plan = Distillation({"term": term}, FrozenTeacher(teacher.to(args.device)), PLAIN)
    model = DistilledClassifier(student, PLAIN, 32, plan)
    assert model.distiller is not None
    for loss, _ in pre_stage_losses(model.distiller).values():
        loss.finish_pre_stage()  # its heads cost the same whatever they have learned
    return model


def joint(args: argparse.Namespace) -> DistilledClassifier:
    student, net = build_classifier(args.student, 100), build_classifier(args.teacher, 100)
    booster = Booster(net, student, [])
    return DistilledClassifier(
        student, PLAIN, 32, Distillation({"hint": TERMS["Rocket"]}, booster=booster)
    )


def table(rounds: list[dict[str, float]]) -> str:
    lines = [
        "| method | ms | ratio to KD | quartiles | supplement |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in rounds[0]:
        ratios = [each[name] / each["KD"] for each in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1000 * statistics.median(each[name] for each in rounds)
        known = f"{PUBLISHED[name] / PUBLISHED['KD']:.1f}" if name in PUBLISHED else ""
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(f"| {name} | {milliseconds:.1f} | {middle:.2f} | {spread} | {known} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
