"""What the workbenches of both detection hosts share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from kd_det.bench.looks import evaluating
from kd_det.bench.workbench import Detections, Side, Workbench, side_model
from kd_det.core.taps import TapRecorder
from kd_det.procedures.base import TrainingSet, build_procedures


class DetectionWorkbench(Workbench):
    """A run of a detector. Each host adds how its detectors take images and return detections."""

    @abstractmethod
    def _training_images(self) -> int:
        """Number of images in the training set."""

    @abstractmethod
    def _arguments(self, side: Side, picture: Tensor) -> tuple[Any, ...]:
        """Arguments of an inference forward of a side for a uint8 RGB image ``[3, H, W]``."""

    @abstractmethod
    def _detections(self, output: Any) -> Detections:
        """The detections in the output of a forward of one image."""

    def _ready(self, side: Side) -> Any:
        """The stock model of a side, prepared for images of its test size."""
        return side_model(self, side)

    def iterations(self) -> int:
        procedures = build_procedures(self.cfg, lambda: TrainingSet(self._training_images()))
        return int(procedures.planned_config(self.cfg).SOLVER.MAX_ITER)

    def predict(self, side: Side, picture: Tensor) -> Detections:
        with evaluating(self._ready(side)) as model:
            return self._detections(model(*self._arguments(side, picture)))

    def example(self, side: Side) -> tuple[Any, ...]:
        self._ready(side)
        return self._arguments(side, self._example_picture)

    def _outputs(self, model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        # Detections alone would not do: an untrained student has none.
        recorder = TapRecorder(model, {"maps": "backbone"})
        with evaluating(model), recorder.recording():
            detections = self._detections(model(*arguments))
        maps = recorder.read()["maps"]
        recorder.release()
        named = {f"level {name} of the backbone": value for name, value in maps.items()}
        return named | vars(detections)
