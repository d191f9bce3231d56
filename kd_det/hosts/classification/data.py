"""Image classification data: torchvision's data sets, and scikit-learn's digits, always there.

Nothing is ever downloaded here. Items are ``(image [3, H, W] float in 0..1, class, index)``; the
index is that of the whole training set.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from kd_det.core.errors import check_known, fail
from kd_det.data.catalogue import data_root
from kd_det.data.digits.images import DigitImages


@dataclass(frozen=True)
class Source:
    """A data set by name; ``layout`` and ``command``, how to get it, are for the error message."""

    build: Callable[[Path], Any]  # root -> dataset of (PIL image or uint8 tensor, class)
    num_classes: int
    layout: str = ""  # what lies where below the data root
    command: str = ""
    # root -> names of the classes, in their order; None where the files are not there
    names: Callable[[Path], list[str] | None] = lambda root: None


class CoarseCIFAR100(datasets.CIFAR100):
    """CIFAR-100 with its 20 superclasses."""

    def __init__(self, root: Path, train: bool) -> None:
        super().__init__(str(root), train=train)
        # torchvision keeps the fine labels only; both are in the files it has just verified.
        path = Path(self.root) / self.base_folder / ("train" if train else "test")
        self.targets = list(_unpickled(path)["coarse_labels"])


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content: dict[str, Any] = pickle.load(file, encoding="latin1")
    return content


def _cifar_names(root: Path, kind: type[datasets.CIFAR10], key: str) -> list[str] | None:
    path = root / kind.base_folder / kind.meta["filename"]
    intact = datasets.utils.check_integrity(str(path), kind.meta["md5"])
    return _unpickled(path).get(key) if intact else None


def _folder_names(folder: Path) -> list[str] | None:
    """As ``ImageFolder`` numbers them, without a look at the images."""
    return datasets.folder.find_classes(str(folder))[0] if folder.is_dir() else None


class TinyImageNetVal(Dataset):
    """The validation images of Tiny-ImageNet, whose classes are in a text file."""

    def __init__(self, root: Path, classes: list[str]) -> None:
        self.loader = datasets.folder.default_loader
        lines = (root / "val_annotations.txt").read_text().splitlines()
        entries = [line.split("\t")[:2] for line in lines if line.strip()]
        index = {name: k for k, name in enumerate(classes)}
        self.samples = [(str(root / "images" / name), index[wnid]) for name, wnid in entries]
        self.targets = [target for _, target in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return self.loader(path), target


def _tiny_imagenet(root: Path, split: str) -> Any:
    folder = root / "tiny-imagenet-200"
    train = datasets.ImageFolder(str(folder / "train"))
    return train if split == "train" else TinyImageNetVal(folder / "val", train.classes)


def _imagenet(root: Path, split: str) -> Any:
    return datasets.ImageFolder(str(root / "imagenet" / split))


def _digit_images(root: Path, split: str) -> Any:
    """Always there: they come with scikit-learn, not from ``root``."""
    return DigitImages(split)


def _sources() -> dict[str, Source]:
    found: dict[str, Source] = {}
    cifar = {
        "cifar10": (datasets.CIFAR10, 10, "label_names", "CIFAR10"),
        "cifar100": (datasets.CIFAR100, 100, "fine_label_names", "CIFAR100"),
        "cifar100_coarse": (CoarseCIFAR100, 20, "coarse_label_names", "CIFAR100"),
    }
    for name, (kind, classes, key, official) in cifar.items():
        for split in ("train", "test"):
            train = split == "train"
            found[f"{name}_{split}"] = Source(
                build=partial(kind, train=train),
                num_classes=classes,
                layout=kind.base_folder,
                command='python -c "from torchvision.datasets import '
                f"{official}; {official}('{{root}}', download=True)\"",
                names=partial(_cifar_names, kind=kind, key=key),
            )
    for split in ("train", "val"):
        found[f"tiny_imagenet_{split}"] = Source(
            build=partial(_tiny_imagenet, split=split),
            num_classes=200,
            layout="tiny-imagenet-200/train/<class>/images and tiny-imagenet-200/val",
            command="wget http://cs231n.stanford.edu/tiny-imagenet-200.zip && "
            "unzip -d {root} tiny-imagenet-200.zip",
            names=lambda root: _folder_names(root / "tiny-imagenet-200" / "train"),
        )
        found[f"imagenet_{split}"] = Source(
            build=partial(_imagenet, split=split),
            num_classes=1000,
            layout="imagenet/train/<class> and imagenet/val/<class>",
            command="after registration at image-net.org, unpack the archives of ILSVRC2012 into "
            "{root}/imagenet",
            names=lambda root: _folder_names(root / "imagenet" / "train"),
        )
    for split in ("train", "test"):
        found[f"digit_images_{split}"] = Source(
            build=partial(_digit_images, split=split),
            num_classes=10,
            names=lambda root: [str(digit) for digit in range(10)],
        )
    return found


SOURCES = _sources()
"""Every data set by the name a config uses (``DATASETS.TRAIN: [cifar100_train]``)."""


def build_source(name: str) -> Any:
    """A data set of undecoded images, with its ``targets``.

    Raises:
        KDError: an unknown name, or missing files; the message has the command that gets them.
    """
    check_known("data set in DATASETS", name, SOURCES)
    source, root = SOURCES[name], data_root()
    try:
        with warnings.catch_warnings():
            # torchvision's unpickling of CIFAR passes numpy a deprecated argument.
            warnings.simplefilter("ignore")
            return source.build(root)
    except (OSError, RuntimeError) as error:
        fail(
            expected=f"{name} at {root / source.layout} (set DETECTRON2_DATASETS to use another "
            "folder)",
            received=" ".join(str(error).split()),
            remedy=f"get it by: {source.command.replace('{root}', str(root))}",
        )


def single(names: Any, key: str) -> str:
    """The one data set that a key names."""
    if len(names) != 1:
        fail(
            expected=f"{key} to name one data set",
            received=str(list(names)),
            remedy="write for example [cifar100_train]",
        )
    return str(names[0])


class ClassificationData(Dataset):
    """The training or test set as a run sees it; ``targets``, ``[N]``, are all its classes."""

    def __init__(self, cfg: CfgNode, training: bool) -> None:
        key = "TRAIN" if training else "TEST"
        name = single(cfg.DATASETS[key], f"DATASETS.{key}")
        self.source = build_source(name)
        self.num_classes = SOURCES[name].num_classes
        targets = torch.as_tensor(list(self.source.targets))
        self.kept = torch.arange(len(targets))
        if training and cfg.DATASETS.TRAIN_PER_CLASS:
            self.kept = _first_of_each(targets, cfg.DATASETS.TRAIN_PER_CLASS)
        self.targets = targets[self.kept]
        self._prepare = prepared_by(cfg, training)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """``(image, class)``: before augmentation in training."""
        image, target = self.source[int(self.kept[index])]
        return self._prepare(image), int(target)


def _first_of_each(targets: Tensor, count: int) -> Tensor:
    chosen = [(targets == k).nonzero().flatten()[:count] for k in targets.unique()]
    return torch.cat(chosen).sort().values


def prepared_by(cfg: CfgNode, training: bool) -> v2.Transform:
    """What a config does to an image: to RGB in 0..1 of ``INPUT.SIZE``, in training augmented."""
    size = cfg.INPUT.SIZE
    steps: list[v2.Transform] = [v2.ToImage(), v2.RGB()]
    if not training and cfg.INPUT.MIN_SIZE_TEST:
        steps += [v2.Resize(cfg.INPUT.MIN_SIZE_TEST, antialias=True), v2.CenterCrop(size)]
    elif not (training and cfg.INPUT.CROP.TYPE == "resized"):
        # A resized crop chooses its own part of the image.
        steps.append(v2.Resize((size, size), antialias=True))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def augmentation(cfg: CfgNode) -> v2.Transform:
    """The random part of training, on float images ``[3, H, W]``."""
    size, crop = cfg.INPUT.SIZE, cfg.INPUT.CROP
    steps: list[v2.Transform] = []
    if crop.TYPE == "pad":
        steps.append(v2.RandomCrop(size, padding=crop.PADDING, padding_mode=crop.PADDING_MODE))
    elif crop.TYPE == "resized":
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    if cfg.INPUT.RANDOM_FLIP == "horizontal":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps) if steps else v2.Identity()
