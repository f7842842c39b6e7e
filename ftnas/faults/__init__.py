"""Fault models, and `inject`, which puts them into any ``nn.Module``."""

from ftnas.faults.base import FAULTS, Fault, Plan, Site, create_fault
from ftnas.faults.feature import MiBB
from ftnas.faults.inject import Injection, InjectionRecord, inject
from ftnas.faults.weight import AdSAF

__all__ = [
    "FAULTS",
    "AdSAF",
    "Fault",
    "Injection",
    "InjectionRecord",
    "MiBB",
    "Plan",
    "Site",
    "create_fault",
    "inject",
]
