"""What this host offers; see :class:`kd_det.hosts.base.Host`."""

from kd_det.hosts.base import Host
from kd_det.hosts.classification.classes import class_names
from kd_det.hosts.classification.config import get_cfg, load_config
from kd_det.hosts.classification.export import export_student
from kd_det.hosts.classification.teacher import build_teacher, num_classes
from kd_det.hosts.classification.train import check_run, run
from kd_det.hosts.classification.workbench import open_bench

HOST = Host(
    name="classification",
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
