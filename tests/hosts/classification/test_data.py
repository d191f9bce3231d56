"""Data sets of the classification host, with files written in the real formats."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kd_det.data.digits.images import DigitImages
from kd_det.hosts.classification.classes import class_names
from kd_det.hosts.classification.data import SOURCES, ClassificationData, build_source


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def test_digits_are_split_once_for_all_with_every_class_in_proportion():
    train, test = DigitImages("train"), DigitImages("test")
    assert (len(train), len(test)) == (1078, 719)
    pixels = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    # A few scans of the set are equal to each other; the parts share no more than those.
    assert len(pixels[0] & pixels[1]) <= 2
    shares = [torch.bincount(torch.tensor(part.targets)) / len(part) for part in (train, test)]
    torch.testing.assert_close(*shares, atol=0.005, rtol=0)


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if not n.startswith("digit")))
def test_missing_data_says_where_it_goes_and_how_to_get_it(root, refuses, name):
    with refuses(f"expected {name} at {root}", "get it by:"):
        build_source(name)
    assert list(root.iterdir()) == []


def test_an_unknown_data_set_is_refused_with_the_nearest(refuses):
    with refuses("did you mean 'cifar100_train'?"):
        build_source("cifar100_trian")


def test_imagenet_folders_are_read(config, root):
    for split in ("train", "val"):
        for k, wnid in enumerate(("n01440764", "n01443537")):
            folder = root / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            pixels = np.full((40, 60, 3), 100 * k, np.uint8)
            Image.fromarray(pixels).save(folder / f"{wnid}_1.JPEG")
    cfg = config(DATASETS={"TRAIN": ["imagenet_train"], "TEST": ["imagenet_val"]})
    cfg.INPUT.SIZE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.CROP.TYPE = 24, 32, "resized"
    test, train = ClassificationData(cfg, training=False), ClassificationData(cfg, training=True)
    image, target = test[1]
    assert (image.shape, target, test.num_classes) == ((3, 24, 24), 1, 1000)
    torch.testing.assert_close(image, torch.full_like(image, 100 / 255), atol=0.02, rtol=0)
    assert train[0][0].shape == (3, 40, 60)  # the random crop comes later


def test_tiny_imagenet_takes_its_validation_classes_from_the_text_file(config, root):
    base = root / "tiny-imagenet-200"
    wnids = ("n01", "n02")
    for k, wnid in enumerate(wnids):
        (base / "train" / wnid / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), (k, 0, 0)).save(base / "train" / wnid / "images" / "a.JPEG")
    (base / "val" / "images").mkdir(parents=True)
    lines = ""
    for k, wnid in enumerate(("n02", "n01")):
        Image.new("RGB", (64, 64)).save(base / "val" / "images" / f"val_{k}.JPEG")
        lines += f"val_{k}.JPEG\t{wnid}\t0\t0\t62\t62\n"
    (base / "val" / "val_annotations.txt").write_text(lines)
    cfg = config(DATASETS={"TRAIN": ["tiny_imagenet_train"], "TEST": ["tiny_imagenet_val"]})
    assert ClassificationData(cfg, training=False).targets.tolist() == [1, 0]
    assert ClassificationData(cfg, training=True).targets.tolist() == [0, 1]


@pytest.fixture
def cifar100(root, monkeypatch):
    """CIFAR-100's python files with four images, under the checksums of these very files."""
    import hashlib

    from torchvision.datasets import CIFAR100

    folder = root / "cifar-100-python"
    folder.mkdir()
    sums = {}
    rng = np.random.default_rng(0)
    for split in ("train", "test", "meta"):
        content = {
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "fine_labels": [9, 8, 7, 6],
            "coarse_labels": [3, 2, 1, 0],
            "fine_label_names": [f"fine{k}" for k in range(100)],
        }
        (folder / split).write_bytes(pickle.dumps(content))
        sums[split] = hashlib.md5((folder / split).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setitem(CIFAR100.meta, "md5", sums["meta"])


def test_cifar100_comes_with_fine_or_coarse_classes(config, cifar100):
    names = {"TRAIN": ["cifar100_train"], "TEST": ["cifar100_test"]}
    fine = ClassificationData(config(DATASETS={**names, "TRAIN_PER_CLASS": 0}), training=True)
    names = {"TRAIN": ["cifar100_coarse_train"], "TEST": ["cifar100_coarse_test"]}
    coarse = ClassificationData(config(DATASETS={**names, "TRAIN_PER_CLASS": 0}), training=True)
    assert (fine.targets.tolist(), fine.num_classes) == ([9, 8, 7, 6], 100)
    assert (coarse.targets.tolist(), coarse.num_classes) == ([3, 2, 1, 0], 20)
    assert fine[0][0].shape == (3, 16, 16)


def test_names_of_cifar_are_those_of_its_own_file(config, root, cifar100):
    names = class_names(config(DATASETS={"TRAIN": ["cifar100_train"]}))
    assert names == [f"fine{k}" for k in range(100)]
    (root / "cifar-100-python" / "meta").write_bytes(b"damaged")
    assert class_names(config(DATASETS={"TRAIN": ["cifar100_train"]})) is None


def test_damaged_cifar_is_refused(root, cifar100, refuses):
    (root / "cifar-100-python" / "train").write_bytes(b"")
    with refuses("cifar100_train", "get it by:"):
        build_source("cifar100_train")


def test_the_first_images_of_every_class_are_kept(config):
    few = ClassificationData(config(DATASETS={"TRAIN_PER_CLASS": 3}), training=True)
    every = ClassificationData(config(DATASETS={"TRAIN_PER_CLASS": 0}), training=True)
    assert torch.bincount(few.targets).tolist() == [3] * 10
    for k in range(10):
        first = (every.targets == k).nonzero().flatten()[:3]
        assert torch.equal(few.kept[few.targets == k], first)
