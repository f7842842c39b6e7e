"""Fault models, and `inject`, which puts them into any ``nn.Module``."""

from ftnas.faults.base import FAULTS, Fault, Plan, Site, Uniform, Where, create_fault
from ftnas.faults.bitflip import WeightBitFlip
from ftnas.faults.changes import Change
from ftnas.faults.defects import DefectMap
from ftnas.faults.feature import FeatureBitFlip, MiBB
from ftnas.faults.inject import inject
from ftnas.faults.injection import Injection
from ftnas.faults.neuron import NeuronByzantine, NeuronCrash
from ftnas.faults.outage import NodeDown
from ftnas.faults.plans import PlanSet
from ftnas.faults.record import InjectionRecord
from ftnas.faults.stuck import AdSAF, BitAdSAF
from ftnas.faults.variation import LogNormalVariation, ReciprocalNormalVariation

__all__ = [
    "FAULTS",
    "AdSAF",
    "BitAdSAF",
    "Change",
    "DefectMap",
    "Fault",
    "FeatureBitFlip",
    "Injection",
    "InjectionRecord",
    "LogNormalVariation",
    "MiBB",
    "NeuronByzantine",
    "NeuronCrash",
    "NodeDown",
    "Plan",
    "PlanSet",
    "ReciprocalNormalVariation",
    "Site",
    "Uniform",
    "Where",
    "WeightBitFlip",
    "create_fault",
    "inject",
]
