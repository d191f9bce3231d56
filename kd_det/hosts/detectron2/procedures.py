"""Procedures on this host: the loader, and the hook that calls them.

Where a procedure chooses the images, place and order of every batch follow from the seed and the
iteration alone, and every iteration begins with random numbers of its own: a resumed run selects
what the uninterrupted one would have. With ``DATALOADER.NUM_WORKERS`` above 0 that holds for the
order of the images, but the random augmentation of loader processes starts anew, as in any resumed
run of Detectron2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from numpy.typing import NDArray
from torch import Tensor

from kd_det.core.distributed import rank, world_size
from kd_det.core.errors import fail
from kd_det.core.seeds import keyed_generator
from kd_det.hosts.detectron2.datasets import training_dicts
from kd_det.procedures.base import (
    ImageChange,
    PeriodLoader,
    TrainingLoop,
    TrainingSet,
    active_procedures,
    build_procedures,
    check_procedures,
)

INDEX = "kd_index"
"""Key of a mapped image's place in the training set."""

Batch = list[dict[str, Any]]


def check_run_procedures(cfg: CfgNode) -> None:
    """Refuse what the procedures of a run cannot do on this host, or for a plain student."""
    student = cfg.MODEL.META_ARCHITECTURE
    for procedure in active_procedures(cfg):
        if procedure.in_training and not student.startswith("Distilled"):
            fail(
                expected=f"a distilled student for KD.{procedure.name}, such as DistilledRCNN",
                received=f"MODEL.META_ARCHITECTURE {student}",
                remedy=f"set it, or KD.{procedure.name}.ENABLED False",
            )
    check_procedures(cfg, frozenset())


class TrainingData:
    """The training images of a run with procedures, and its plan.

    Args:
        cfg: the config before the procedures have planned the run.

    Attributes:
        cfg: the config; its ``SOLVER`` counts the iterations that the run really takes.
        procedures: of the run; empty where it has none, and the stock loader is used.
        dataset: dataset dicts with their place in the training set, :data:`INDEX`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_run_procedures(cfg)
        self.seed = cfg.SEED
        self.dataset: Any = ()
        self.sampler: Any = None
        self.procedures = build_procedures(cfg, lambda: self._read(cfg))
        self.cfg = self.procedures.planned_config(cfg)

    def _read(self, cfg: CfgNode) -> TrainingSet:
        dicts = training_dicts(cfg)
        self.dataset = DatasetFromList([{**d, INDEX: i} for i, d in enumerate(dicts)], copy=False)
        self.seed = self.seed if self.seed >= 0 else int(comm.shared_random_seed())
        return TrainingSet(len(dicts), self.seed, rank())

    def build_loader(self, cfg: CfgNode) -> ProcedureLoader:
        """Detectron2's loader of the images that the procedures choose and change."""
        wide = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            wide = torch.tensor([d["width"] > d["height"] for d in self.dataset])
        sampler = self.procedures.chooser.sampler(self.seed, rank(), world_size(), wide)
        self.sampler = sampler
        mapper: Any = DatasetMapper(cfg, True)
        if (change := self.procedures.chooser.image_change()) is not None:
            mapper = ChangingMapper(mapper, self.dataset, change)
        arguments: dict[str, Any] = {}
        if sampler is not None:
            # The sampler deals whole batches: only then is the place in the run exact. A new
            # iterator must not draw from the random numbers of its iteration.
            arguments = {"sampler": sampler, "aspect_ratio_grouping": False, "seed": self.seed}
        loader = build_detection_train_loader(cfg, dataset=self.dataset, mapper=mapper, **arguments)
        return ProcedureLoader(loader, self.procedures, cfg.SOLVER.MAX_ITER)


class BatchAccess(TrainingLoop):
    """What procedures find in a batch of this host; see :class:`TrainingLoop`."""

    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        return [batch[row] for row in rows]

    def indices(self, batch: Batch) -> Tensor:
        return torch.tensor([image[INDEX] for image in batch])


class ProcedureLoader(PeriodLoader):
    """Batches as the procedures change them; ``batch`` is the last one."""

    batch: Batch

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.batch = self.procedures.on_batch(batch, BatchAccess())
            yield self.batch


class ProcedureHook(HookBase, BatchAccess):
    """Calls the hooks of procedures, and keeps their state and their costs.

    Must come before the hook that saves checkpoints, which hold its state. ``costs`` are those of
    the finished run.
    """

    def __init__(self, data: TrainingData) -> None:
        self.procedures, self.data, self.seed = data.procedures, data, data.seed
        self.save_period = data.cfg.SOLVER.CHECKPOINT_PERIOD
        self.costs: dict[str, float] = {}

    def before_train(self) -> None:
        if self.data.sampler is not None:
            self.data.sampler.seed = self.seed

    def before_step(self) -> None:
        if self.data.sampler is not None:
            generator = keyed_generator(self.seed, rank(), self.trainer.iter)
            seed_all_rng(int(torch.randint(2**31, (), generator=generator)))

    def after_step(self) -> None:
        self.procedures.on_step(self.trainer.data_loader.batch, self)
        done = self.trainer.iter + 1
        if done % self.save_period == 0 or done == self.trainer.max_iter:
            self.procedures.synchronize()
        self.trainer.storage.put_scalars(**self.procedures.scalars(), smoothing_hint=False)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # interrupted
        self.costs = self.procedures.costs(self)
        shares = {f"cost/{name}": share for name, share in self.costs.items()}
        self.trainer.storage.put_scalars(**shares, smoothing_hint=False)

    def uncertainties(self) -> Tensor:
        model = self.trainer.model
        values: Tensor = getattr(model, "module", model).image_values
        return values

    def state_dict(self) -> dict[str, Any]:
        return {**self.procedures.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.procedures.load_state_dict(state)
        self.seed = state["seed"]


def with_new_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a trainer, whose procedures' hook had another name in former versions."""
    hooks = dict(state.get("hooks") or {})
    if "Condense" in hooks:
        hooks[ProcedureHook.__qualname__] = hooks.pop("Condense")
    return {**state, "hooks": hooks}


class ChangingMapper:
    """Detectron2's mapper, whose first augmentation is what a procedure makes of the image.

    Images are changed before any geometric augmentation, and never stored. Boxes and masks are
    those of the image itself. ``change`` sees floats ``[C, H, W]`` in the range of the pixels, in
    the mapper's order of channels.
    """

    def __init__(self, mapper: DatasetMapper, dataset: Any, change: ImageChange) -> None:
        self.mapper, self.dataset, self.change = mapper, dataset, change
        self._index = -1
        first = _Replaced(self._changed)
        mapper.augmentations = T.AugmentationList([first, mapper.augmentations])

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        self._index = dataset_dict[INDEX]
        return self.mapper(dataset_dict)

    def _changed(self, image: NDArray[Any]) -> NDArray[Any]:
        def read(index: int) -> Tensor:
            pixels = image
            if index != self._index:
                file_name = self.dataset[index]["file_name"]
                pixels = utils.read_image(file_name, format=self.mapper.image_format)
            return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)

        changed = self.change(self._index, read)
        if changed is None:
            return image
        pixels = changed.permute(1, 2, 0).numpy()
        # Rounded: cutting off decimals would darken every image.
        return pixels.round().clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else pixels


class _Replaced(T.NoOpTransform):
    """Another image of the same size; coordinates stay."""

    def __init__(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        super().__init__()
        self.change = change

    def apply_image(self, img: NDArray[Any]) -> NDArray[Any]:
        return self.change(img)

    def apply_segmentation(self, segmentation: NDArray[Any]) -> NDArray[Any]:
        return segmentation
