"""Hosts: models, data and trainer of one framework per folder, behind the contract in ``base``."""
