"""What pyproject.toml cannot say: the folder ``configs/`` is installed as ``kd_det/configs/``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kd_det", "kd_det.*"]), "kd_det.configs"],
    package_dir={"kd_det.configs": "configs"},
)
