"""Procedures: methods that choose or change the batches of a run, or train something beforehand."""

from kd_det.procedures.base import PROCEDURES, Procedure, register
from kd_det.procedures.joint import Joint
from kd_det.procedures.kcd.procedure import KCD
from kd_det.procedures.pre_stage import PreStage
from kd_det.procedures.unix import UNIX

__all__ = ["KCD", "PROCEDURES", "UNIX", "Joint", "PreStage", "Procedure", "register"]
