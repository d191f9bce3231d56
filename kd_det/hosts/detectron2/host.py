"""What this host offers; see :class:`kd_det.hosts.base.Host`."""

from kd_det.hosts.base import Host
from kd_det.hosts.detectron2.classes import class_names, num_classes
from kd_det.hosts.detectron2.config import get_cfg, load_config
from kd_det.hosts.detectron2.export import export_student
from kd_det.hosts.detectron2.teacher import build_teacher
from kd_det.hosts.detectron2.train import check_run, run
from kd_det.hosts.detectron2.workbench import open_bench

HOST = Host(
    name="detectron2",
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
