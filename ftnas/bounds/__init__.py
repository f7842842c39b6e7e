"""How much failure a network tolerates, without running every failure."""

from ftnas.bounds.crashes import Moments, exact, linear, sampled, single
from ftnas.bounds.cut import INPUT, Cut
from ftnas.bounds.expected import absolute, norm
from ftnas.bounds.summary import Summary, summarize

__all__ = [
    "INPUT",
    "Cut",
    "Moments",
    "Summary",
    "absolute",
    "exact",
    "linear",
    "norm",
    "sampled",
    "single",
    "summarize",
]
