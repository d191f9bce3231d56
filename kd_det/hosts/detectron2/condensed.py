"""KCD on this host: loader, sampler and the hook that condenses.

What it shares with other detectors is in :mod:`kd_det.hosts.detection.kcd`.

Place and order of every batch follow from the seed and the iteration alone, and every iteration
begins with random numbers of its own: a resumed run selects what the uninterrupted one would
have. With ``DATALOADER.NUM_WORKERS`` above 0 that holds for the order of the images, but the random
augmentation of loader processes starts anew, as in any resumed run of Detectron2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from kd_det.core.errors import fail
from kd_det.core.seeds import keyed_generator
from kd_det.hosts.detection.kcd import StageLoader, build_condensation, planned_config, report_costs
from kd_det.hosts.detection.kcd import check_kcd as check_detection_kcd
from kd_det.hosts.detectron2.blending import BlendMapper
from kd_det.hosts.detectron2.datasets import training_dicts
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.sampler import InfiniteSubsetSampler
from kd_det.procedures.kcd.selection import kcd_cost
from kd_det.run.config import is_condensed

#: Key of a mapped image's place in the training set.
INDEX = "kd_index"

logger = logging.getLogger(__name__)


def check_kcd(cfg: CfgNode) -> None:
    """Refuse what KCD cannot do on this host.

    Raises:
        KDError: a student that is not distilled, classes of images, partners that show too much,
            another sampler, or numbers that KCD itself refuses.
    """
    if not is_condensed(cfg):
        return
    node, student = cfg.KD.KCD, cfg.MODEL.META_ARCHITECTURE
    if not student.startswith("Distilled"):
        fail(
            expected="a distilled student for KD.KCD, such as DistilledRCNN",
            received=f"MODEL.META_ARCHITECTURE {student}",
            remedy="set it, or KD.KCD.ENABLED False",
        )
    check_detection_kcd(cfg)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        fail(
            expected="DATALOADER.SAMPLER_TRAIN TrainingSampler with KD.KCD, which samples itself",
            received=cfg.DATALOADER.SAMPLER_TRAIN,
            remedy="set it to TrainingSampler, or KD.KCD.ENABLED False",
        )
    kcd_cost(node.RHO, cfg.SOLVER.MAX_ITER, node.PERIOD, schedule=node.SCHEDULE)


class CondensedRun:
    """What a run with ``KD.KCD`` needs beside the stock trainer.

    Args:
        cfg: the config of the run on the whole training set.

    Attributes:
        condensation: the state.
        cfg: the same config; its ``SOLVER`` counts the iterations the condensed run really takes.

    Raises:
        KDError: see :func:`check_kcd`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_kcd(cfg)
        dicts = training_dicts(cfg)
        condensation = build_condensation(cfg, len(dicts))
        assert condensation is not None
        self.condensation = condensation
        self.cfg = planned_config(cfg, condensation)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._wide = torch.tensor([d["width"] > d["height"] for d in dicts])
        self._dataset = DatasetFromList([{**d, INDEX: i} for i, d in enumerate(dicts)], copy=False)

    def build_loader(self, cfg: CfgNode) -> IndexedLoader:
        """Detectron2's loader over the active images, blended as the condensation says."""
        sampler = InfiniteSubsetSampler(self.condensation, self.seed)
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            sampler = OrientedSampler(self.condensation, self.seed, self._wide)
        loader = build_detection_train_loader(
            cfg,
            dataset=self._dataset,
            sampler=sampler,
            mapper=BlendMapper(DatasetMapper(cfg, True), self._dataset, self.condensation, INDEX),
            # The sampler deals whole batches: only then is the place in the run exact.
            aspect_ratio_grouping=False,
            # A new iterator must not draw from the random numbers of its iteration.
            seed=self.seed,
        )
        return IndexedLoader(loader, sampler)


class OrientedSampler(InfiniteSubsetSampler):
    """The same stream, dealt in batches of images that are all wide or all not, as they fill up.

    Detectron2's own grouping happens behind the sampler and would make the place in the run
    inexact: a few images always wait in it for a batch to fill.

    Args:
        condensation: see :class:`kd_det.procedures.kcd.sampler.InfiniteSubsetSampler`.
        seed: likewise.
        wide: for each image of the training set, whether it is wider than high; ``[N]`` bool.
    """

    def __init__(self, condensation: Condensation, seed: int, wide: Tensor) -> None:
        super().__init__(condensation, seed)
        self._wide = wide

    def __iter__(self) -> Iterator[int]:
        state = self.condensation
        assert state.batch is not None
        stream = islice(self._stream(state.stage, 0), self.rank, None, self.world)
        # From the start of the stage: what waited at a checkpoint must wait again.
        batches = islice(self._batches(stream, state.batch // self.world), state.position, None)
        return chain.from_iterable(batches)

    def _batches(self, stream: Iterable[int], size: int) -> Iterator[list[int]]:
        waiting: tuple[list[int], list[int]] = ([], [])
        for index in stream:
            batch = waiting[int(self._wide[index])]
            batch.append(index)
            if len(batch) == size:
                yield batch.copy()
                batch.clear()


class IndexedLoader(StageLoader):
    """Knows which images its last batch has.

    Args:
        loader: as :class:`StageLoader`'s, with the place of every image in the training set.
        sampler: of the loader.

    Attributes:
        indices: the places of the last batch's images in the training set.
    """

    def __init__(self, loader: Iterable[Any], sampler: InfiniteSubsetSampler) -> None:
        super().__init__(loader, sampler.condensation)
        self.sampler = sampler
        self.indices: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.indices = [image[INDEX] for image in batch]
            yield batch


class Condense(HookBase):
    """Keeps the ledger, condenses when a stage ends, and reports what it cost.

    Must come before the hook that saves checkpoints, which hold its state.

    Args:
        run: the run's condensation.
    """

    def __init__(self, run: CondensedRun) -> None:
        self.state = run.condensation
        self.seed = run.seed
        self.save_period = run.cfg.SOLVER.CHECKPOINT_PERIOD

    def before_train(self) -> None:
        self.trainer.data_loader.sampler.seed = self.seed

    def before_step(self) -> None:
        generator = keyed_generator(self.seed, comm.get_rank(), self.trainer.iter)
        seed_all_rng(int(torch.randint(2**31, (), generator=generator)))

    def after_step(self) -> None:
        model = self.trainer.model
        values = getattr(model, "module", model).image_values
        self.state.update(torch.tensor(self.trainer.data_loader.indices), values)
        done = self.trainer.iter + 1
        parts = self.state.step()
        if parts is not None:
            logger.info(
                "KCD stage %d: %d images stay, %d were dropped now, %d are blended",
                self.state.stage,
                len(parts.keep),
                len(parts.drop),
                len(self.state.recipes),
            )
        if done % self.save_period == 0 or done == self.trainer.max_iter:
            self.state.ledger.merge()
        self.trainer.storage.put_scalar("kcd/images", len(self.state.active), smoothing_hint=False)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # interrupted
        found = {f"kcd/{name}": cost for name, cost in report_costs(self.state).items()}
        self.trainer.storage.put_scalars(**found, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"condensation": self.state.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.load_state_dict(state["condensation"])
        self.seed = state["seed"]
