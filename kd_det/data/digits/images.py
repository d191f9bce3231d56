"""scikit-learn's bundled handwritten digits as a classification data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

_TEST_SHARE, _SPLIT_SEED = 0.4, 0


class DigitImages(Dataset):
    """1,797 real 8 x 8 scans, 60 % for training, every class in proportion in both parts.

    Args:
        split: ``train`` (1,078 images) or ``test`` (719).

    Attributes:
        images: uint8 ``[N, 1, 8, 8]``.
        targets: class of every image.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            digits.images,
            digits.target,
            test_size=_TEST_SHARE,
            stratify=digits.target,
            random_state=_SPLIT_SEED,
        )
        train = split == "train"
        images, targets = (parts[0], parts[2]) if train else (parts[1], parts[3])
        # Grey values are 0..16.
        self.images = torch.from_numpy(images * (255 / 16)).round().to(torch.uint8)[:, None]
        self.targets = [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """``(image [1, 8, 8], class)``."""
        return self.images[index], self.targets[index]
