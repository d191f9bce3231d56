"""What this host offers; see :class:`kd_det.hosts.base.Host`."""

from kd_det.hosts.base import Host
from kd_det.hosts.torchvision_detection.classes import class_names
from kd_det.hosts.torchvision_detection.config import get_cfg, load_config
from kd_det.hosts.torchvision_detection.export import export_student
from kd_det.hosts.torchvision_detection.models import num_classes
from kd_det.hosts.torchvision_detection.teacher import build_teacher
from kd_det.hosts.torchvision_detection.train import check_run, run
from kd_det.hosts.torchvision_detection.workbench import open_bench

HOST = Host(
    name="torchvision_detection",
    get_cfg=get_cfg,
    load_config=load_config,
    check_run=check_run,
    run=run,
    open_bench=open_bench,
    build_teacher=build_teacher,
    export_student=export_student,
    num_classes=num_classes,
    class_names=class_names,
)
