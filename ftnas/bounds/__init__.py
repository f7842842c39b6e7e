"""How much failure a network tolerates, without running every failure."""

from ftnas.bounds.certificate import (
    BoxOfInputs,
    Certificate,
    certify,
    certify_samples,
    read_certificate,
    verify,
    write_certificate,
)
from ftnas.bounds.crashes import Moments, exact, linear, sampled, single
from ftnas.bounds.cut import INPUT, Cut
from ftnas.bounds.expected import absolute, norm
from ftnas.bounds.margins import Margins, margins
from ftnas.bounds.precision import Precision, precision
from ftnas.bounds.ranges import Ranges, intervals, observed, of_samples
from ftnas.bounds.search import Found, even, largest, tolerances
from ftnas.bounds.summary import Summary, summarize
from ftnas.bounds.worst import Cost, Failures, neuron_costs, synapse_costs, total

__all__ = [
    "INPUT",
    "BoxOfInputs",
    "Certificate",
    "Cost",
    "Cut",
    "Failures",
    "Found",
    "Margins",
    "Moments",
    "Precision",
    "Ranges",
    "Summary",
    "absolute",
    "certify",
    "certify_samples",
    "even",
    "exact",
    "intervals",
    "largest",
    "linear",
    "margins",
    "neuron_costs",
    "norm",
    "observed",
    "of_samples",
    "precision",
    "read_certificate",
    "sampled",
    "single",
    "summarize",
    "synapse_costs",
    "tolerances",
    "total",
    "verify",
    "write_certificate",
]
