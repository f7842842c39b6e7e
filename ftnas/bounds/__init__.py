"""How much failure a network tolerates, without running every failure."""

from ftnas.bounds.crashes import Moments, exact, linear, sampled, single
from ftnas.bounds.cut import INPUT, Cut
from ftnas.bounds.expected import absolute, norm
from ftnas.bounds.precision import Precision, precision
from ftnas.bounds.ranges import Ranges, intervals, observed, of_samples
from ftnas.bounds.search import Found, even, largest, tolerances
from ftnas.bounds.summary import Summary, summarize
from ftnas.bounds.worst import Cost, Failures, neuron_costs, synapse_costs, total

__all__ = [
    "INPUT",
    "Cost",
    "Cut",
    "Failures",
    "Found",
    "Moments",
    "Precision",
    "Ranges",
    "Summary",
    "absolute",
    "even",
    "exact",
    "intervals",
    "largest",
    "linear",
    "neuron_costs",
    "norm",
    "observed",
    "of_samples",
    "precision",
    "sampled",
    "single",
    "summarize",
    "synapse_costs",
    "tolerances",
    "total",
]
