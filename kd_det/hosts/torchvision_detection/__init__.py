"""The torchvision host: stock Faster, Mask R-CNN, RetinaNet and FCOS, trained by Lightning.

As a library: :class:`DistilledDetector` around any two torchvision detectors. From a config:
:func:`kd_det.hosts.torchvision_detection.train.run`.
"""

from kd_det.hosts.torchvision_detection.config import get_cfg, load_config
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.teacher import build_teacher

__all__ = ["DistilledDetector", "build_model", "build_teacher", "get_cfg", "load_config"]
