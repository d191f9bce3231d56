"""The Detectron2 host: importing it registers the distilled meta-architectures and backbones."""

from kd_det.hosts.detectron2.config import add_kd_config, get_cfg
from kd_det.hosts.detectron2.meta_arch import (
    Distillation,
    DistilledFCOS,
    DistilledRCNN,
    DistilledRetinaNet,
)
from kd_det.hosts.detectron2.teacher import build_teacher

__all__ = [
    "Distillation",
    "DistilledFCOS",
    "DistilledRCNN",
    "DistilledRetinaNet",
    "add_kd_config",
    "build_teacher",
    "get_cfg",
]
