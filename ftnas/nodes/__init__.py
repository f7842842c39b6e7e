"""Networks split over physical nodes that survive the loss of one (ResiliNet)."""

from ftnas.nodes.exact import PatternAccuracy, average, evaluate, patterns
from ftnas.nodes.network import Failout, SplitNetwork, Weighting
from ftnas.nodes.partition import INPUT, Node, Partition, Skip

__all__ = [
    "INPUT",
    "Failout",
    "Node",
    "Partition",
    "PatternAccuracy",
    "Skip",
    "SplitNetwork",
    "Weighting",
    "average",
    "evaluate",
    "patterns",
]
