"""How much failure a network tolerates, without running every failure."""

from ftnas.bounds.byzantine import byzantine, byzantine_from_variance, variance_from_byzantine
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
from ftnas.bounds.images import about_images, every_image
from ftnas.bounds.local import local_answers, local_errors
from ftnas.bounds.loss import WithLoss, loss_shift
from ftnas.bounds.margins import Margins, margins
from ftnas.bounds.precision import Precision, precision
from ftnas.bounds.ranges import Ranges, intervals, observed, of_samples
from ftnas.bounds.search import Found, even, largest, tolerances
from ftnas.bounds.several import exact_jointly, sampled_jointly, superposed
from ftnas.bounds.summary import Summary, summarize
from ftnas.bounds.tail import tail, tail_above, tail_norm
from ftnas.bounds.weights import WeightForm, from_weights, loss_shift_from_weights
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
    "WeightForm",
    "WithLoss",
    "about_images",
    "absolute",
    "byzantine",
    "byzantine_from_variance",
    "certify",
    "certify_samples",
    "even",
    "every_image",
    "exact",
    "exact_jointly",
    "from_weights",
    "intervals",
    "largest",
    "linear",
    "loss_shift",
    "loss_shift_from_weights",
    "local_answers",
    "local_errors",
    "margins",
    "neuron_costs",
    "norm",
    "observed",
    "of_samples",
    "precision",
    "read_certificate",
    "sampled",
    "sampled_jointly",
    "single",
    "summarize",
    "superposed",
    "synapse_costs",
    "tail",
    "tail_above",
    "tail_norm",
    "tolerances",
    "total",
    "variance_from_byzantine",
    "verify",
    "write_certificate",
]
