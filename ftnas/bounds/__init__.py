"""How much failure a network tolerates, without running every failure."""

from ftnas.bounds.chain import absolute, norm
from ftnas.bounds.crashes import Moments, exact, linear, sampled, single
from ftnas.bounds.cut import INPUT, Cut

__all__ = ["INPUT", "Cut", "Moments", "absolute", "exact", "linear", "norm", "sampled", "single"]
