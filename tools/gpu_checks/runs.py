"""Checks that train: each writes a config and calls the command line in this process."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from gpu_checks import configs
from gpu_checks.configs import Config

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Machine:
    """Where the runs happen.

    Attributes:
        work: folder of data, configs, runs and the log.
        device: ``"cpu"`` or ``"cuda"``, as ``MODEL.DEVICE``.
    """

    work: Path
    device: str

    @property
    def log(self) -> Path:
        return self.work / "log.txt"

    @functools.cached_property
    def data(self) -> Config:
        """``DATASETS`` of the detectors: twelve images of digits."""
        from kd_det.data.digits.detection import DigitsSpec, write_digits

        canvas = 96 if self.device == "cpu" else 320
        spec = DigitsSpec(canvas=canvas, train_images=12, val_images=2)
        train, *_ = write_digits(self.work / "digits", spec).values()
        files = [str(path) for path in train]
        return {"COCO_JSON": {"check": files}, "TRAIN": ["check"], "TEST": []}

    def student(self, host: str, family: str = "", length: int = 4, amp: bool = False) -> Config:
        """A complete config of a stock model; of the host's first family by default.

        Detectron2 has no mixed precision on a CPU.
        """
        amp = amp and (host, self.device) != ("detectron2", "cpu")
        family = family or next(iter(configs.FAMILIES[host]))
        config = configs.student(host, family, tiny=self.device == "cpu")
        if host != "classification":
            config["DATASETS"] = self.data
        config["MODEL"]["DEVICE"] = self.device
        return configs.merged(config, configs.schedule(host, length, amp))

    def distilled(
        self,
        host: str,
        family: str = "",
        length: int = 4,
        amp: bool = False,
        weight: float | None = None,
    ) -> Config:
        """The same with a teacher that has been trained for two iterations."""
        family = family or next(iter(configs.FAMILIES[host]))
        name = f"teacher {host} {family}"
        if not (weights := self.folder(name) / "model_final.pth").is_file():
            self.train(name, self.student(host, family, 2))
        file = self.folder(name).with_suffix(".yaml")
        teacher = {"CONFIG_FILE": str(file), "WEIGHTS": str(weights)}
        return configs.distilled(self.student(host, family, length, amp), family, teacher, weight)

    def folder(self, name: str) -> Path:
        return self.work / "runs" / name.replace(" ", "_")

    def train(self, name: str, config: Config, *flags: str) -> Weights:
        """Final weights of a run, all finite; without flags a run of that name begins anew."""
        from kd_det.app.train import main

        folder = self.folder(name)
        if not flags:
            shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config | {"OUTPUT_DIR": str(folder)}))
        before = self.log.stat().st_size if self.log.is_file() else 0
        if main(["--config-file", str(file), *flags]):
            sys.stderr.flush()
            message = self.log.read_bytes()[before:].decode() if self.log.is_file() else ""
            raise RuntimeError(message.strip() or "the run was refused")
        weights = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=False)
        if broken := [k for k, v in weights["model"].items() if not torch.isfinite(v).all()]:
            raise AssertionError(f"not finite after training: {', '.join(broken[:3])}")
        return weights["model"]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Repeatable kernels; the log has a warning where PyTorch has none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Interrupted(RuntimeError):
    """A run stops as if its process had been killed, except that this process lives on."""


@contextlib.contextmanager
def counted_updates(interrupt_at: int = 0) -> Iterator[list[int]]:
    """The number of optimiser updates so far, in a list of one.

    Args:
        interrupt_at: above 0, whatever trains is stopped in this update.

    Raises:
        AssertionError: it ended before that update.
    """
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1
        if count[0] == interrupt_at:
            raise Interrupted(f"in update {interrupt_at}, on purpose")

    handle = register_optimizer_step_post_hook(note)
    try:
        yield count
    except Interrupted:
        return
    finally:
        handle.remove()
    if interrupt_at:
        raise AssertionError(f"the run ended after {count[0]} updates, before {interrupt_at}")


def check_identity(machine: Machine, host: str, family: str) -> str:
    """With every weight 0 a run ends in the weights of the stock model's."""
    with deterministic():
        config = machine.distilled(host, family, weight=0.0)
        trained = machine.train(f"zero {host} {family}", config)
        student = {k: v for k, v in trained.items() if not k.startswith("distiller.")}
        stock = machine.student(host, family)
        return compare(student, lambda: machine.train(f"stock {host} {family}", stock))


def check_resumed(machine: Machine, host: str, name: str) -> str:
    """In mixed precision, an interrupted and resumed run ends in the weights of a whole one.

    Raises:
        AssertionError: it does not, or has not been resumed in the middle.
    """
    with deterministic():
        # A detector saves every second iteration, a classifier each of its epochs of three
        # updates: the fifth update is behind a checkpoint. Mixed precision may skip some.
        config = machine.distilled(host, length=5 if host == "classification" else 12, amp=True)
        config["KD"] |= configs.KCD if name == "KCD" else configs.balanced(config)
        with counted_updates(interrupt_at=5):
            machine.train(f"{host} {name} resumed", config)
        with counted_updates() as after:
            resumed = machine.train(f"{host} {name} resumed", config, "--resume")
        if host == "detectron2" and name != "KCD":
            # Detectron2 begins its order of images anew when it resumes.
            if int(resumed["distiller.step"]) != 12:
                raise AssertionError(f"{resumed['distiller.step']} steps of 12 after resuming")
            return f"finite, the last {after[0]} updates after resuming"
        with counted_updates() as whole:
            note = compare(resumed, lambda: machine.train(f"{host} {name} whole", config))
        if not 0 < after[0] < whole[0]:
            raise AssertionError(f"{after[0]} updates after the interruption, {whole[0]} in all")
        return f"{note}, the last {after[0]} updates after resuming"


def check_run(machine: Machine, host: str, name: str) -> str:
    """A short run in mixed precision ends with finite weights."""
    config = machine.distilled(host, amp=True)
    nodes = {"MHGD": configs.graph_term(host), "UNIX": configs.UNIX, "booster": configs.BOOSTER}
    config["KD"] |= nodes[name]
    if name == "booster":
        del config["KD"]["TEACHER"]
    return f"{len(machine.train(f'{host} {name}', config))} tensors finite"


def check_loaders(machine: Machine, host: str) -> str:
    """A run whose batches come from two processes; how many of its loaders pin them."""
    pinned: list[bool] = []
    iterate = DataLoader.__iter__

    def note(loader: DataLoader) -> Any:
        pinned.append(loader.pin_memory)
        return iterate(loader)

    config = configs.merged(machine.student(host), {"DATALOADER": {"NUM_WORKERS": 2}})
    setattr(DataLoader, "__iter__", note)  # noqa: B010
    try:
        machine.train(f"loaders {host}", config)
    finally:
        setattr(DataLoader, "__iter__", iterate)  # noqa: B010
    return f"{sum(pinned)} of {len(pinned)} loaders pin their batches"


def check_memory(machine: Machine, host: str) -> str:
    """Peak of tensors on the GPU, with the kernels of an ordinary run."""
    peaks = []
    for kind, make in (("plain", machine.student), ("distilled", machine.distilled)):
        for amp in (False, True):
            config = make(host, length=2, amp=amp)
            torch.cuda.reset_peak_memory_stats()
            machine.train(f"memory {host} {kind} {amp}", config)
            peak = torch.cuda.max_memory_allocated() / 2**20
            peaks.append(f"{kind} in {'AMP' if amp else 'float32'} {peak:.0f} MiB")
    return ", ".join(peaks)


def compare(found: Weights, reference: Callable[[], Weights]) -> str:
    """Compare weights bit by bit with those of a run, which is repeated where they differ.

    A difference counts only if the reference repeats itself: some kernels do not, and the first
    calls of a TorchScript function may use others than the later ones.

    Raises:
        AssertionError: the reference repeats itself and differs.
    """
    first = reference()
    if not different(found, first):
        return f"{len(found)} tensors identical"
    second = reference()
    if not (names := different(found, second)):
        return f"{len(found)} tensors identical to the second of two runs"
    if itself := different(first, second):
        return f"undecided: the reference differs from itself in {len(itself)} tensors"
    raise AssertionError(f"{len(names)} of {len(found)} tensors differ, first {names[0]}")


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    names = sorted(one.keys() | other.keys())
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]
