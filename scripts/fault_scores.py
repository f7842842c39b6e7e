"""Can b3 tell which genotypes keep their accuracy under faults? Kendall's tau with measured faulty accuracy.

Random genotypes are scored on the shared weights of a finished search, on its controller split, in two ways: by
accuracy under many fault draws (the truth here), and from one clean forward and one backward, by the variance of the
margin between the right class and its strongest rival to first order:

- crashes: Var = p sum_i (x_i dm/dx_i)^2 (b3, Proposition 4 of *Fatal Brain Damage*, summed over layers);
- MiBB: Var = sum_i p_i E[e^2] (dm/dx_i)^2, the same with the variance of the bias that a MAC error adds in place of
  that of a crash: p_i = MACs x rate, e = +-2^k steps of the layer's fixed point.

The score is the mean over images of the probability that the margin stays above 0, if the error is normal with that
variance. Beside it stand the clean accuracy, and accuracy under a single fault draw, of about the same cost.

    ftnas search quickstart --out runs/quickstart
    python scripts/fault_scores.py runs/quickstart --genotypes 40
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ftnas import plots
from ftnas.candidates import Candidates, Terms
from ftnas.config import config_from
from ftnas.correlations import correlation_interval
from ftnas.data import load, stratified_split
from ftnas.faults import MiBB, NeuronCrash
from ftnas.faults.base import Fault
from ftnas.mistakes import told
from ftnas.pool import InProcess
from ftnas.progress import track
from ftnas.rng import generator, seed_for
from ftnas.rundir import RunDir
from ftnas.space import Genotype, Supernet, load_space
from ftnas.storage import load_checkpoint
from ftnas.train import CHECKPOINT

BITS = 8


class MarginVariance:
    """Variance of each image's margin when what convolutions give is faulty, to first order.

    Args:
        supernet: Its feature points (after BatchNorm where a convolution has one) are where faults hit.
    """

    def __init__(self, supernet: Supernet) -> None:
        norms = supernet.feature_points()
        modules = dict(supernet.named_modules())
        convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        self._supernet = supernet
        self._seen: list[tuple[nn.Conv2d, Tensor]] = []
        for name, conv in convs.items():
            modules[norms.get(name, name)].register_forward_hook(self._keeping(conv))

    def _keeping(self, conv: nn.Conv2d) -> Any:
        def keep(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            self._seen.append((conv, output))
            return output.clone()  # what follows may write in place

        return keep

    def __call__(self, genotype: Genotype, images: Tensor, labels: Tensor, fault: Fault) -> tuple[Tensor, Tensor]:
        """Return margins and their variances, float32 [B] each."""
        self._seen.clear()
        with torch.enable_grad():
            logits = self._supernet(images, genotype)
            right = logits.gather(1, labels[:, None])[:, 0]
            rival = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
            margin = right - rival
            signs = torch.rand(margin.shape, generator=generator(0, "signs"), device=margin.device) < 0.5
            signed = torch.where(
                signs, margin, -margin
            ).sum()  # BatchNorm ties images: their gradients cancel in the mean
            gradients = torch.autograd.grad(signed, [value for _, value in self._seen], allow_unused=True)
        variance = torch.zeros_like(margin)
        for (conv, value), gradient in zip(self._seen, gradients, strict=True):
            if gradient is not None:
                variance += _spread(fault, conv, value, gradient)
        return margin.detach(), variance.detach()


def _spread(fault: Fault, conv: nn.Conv2d, value: Tensor, gradient: Tensor) -> Tensor:
    """Return the variance that one convolution's faults give the margin: float32 [B]."""
    if isinstance(fault, NeuronCrash):
        return fault.rate * (value.detach() * gradient).square().flatten(1).sum(dim=1)
    assert isinstance(fault, MiBB)
    macs = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
    step = 2.0 ** (torch.ceil(torch.log2(value.detach().abs().amax())) - (BITS - 1))
    square = step**2 * np.mean([4.0**k for k in range(BITS)])
    return (1.0 - (1.0 - fault.mac_error_rate) ** macs) * square * gradient.square().flatten(1).sum(dim=1)


def kept(margin: Tensor, variance: Tensor) -> Tensor:
    """Return the probability that a normal error of that variance leaves the margin above 0: float32 [B]."""
    return torch.special.ndtr(margin / variance.clamp(min=1e-20).sqrt())


def measure(path: Path, fault: Fault, num: int, draws: int) -> dict[str, np.ndarray]:
    """Return scores by name, float64 [num] each."""
    with RunDir.open(path) as run:
        config = config_from(run.config)
        if config.search is None:
            raise ValueError(f"{path} has no search")
        state = load_checkpoint(run.stage("search").file(CHECKPOINT))
    images = load(config.data, "train")
    _, second = stratified_split(images.labels, config.search.split, seed=seed_for(config.seed, "split"))
    space = load_space(config.search.space)
    stream = generator(0, "scored genotypes")
    genotypes = list(dict.fromkeys(Genotype.random(space, generator=stream) for _ in range(num)))
    batches = list(images.subset(second).batches(config.search.controller_batch or 64))

    def supernet() -> Supernet:
        net = Supernet(space, num_classes=len(images.classes), in_channels=images.shape[0])
        net.load_state_dict(state["supernet"])
        return net

    found: dict[str, list[float]] = {"clean accuracy": [], "mean variance (b3)": [], "margins kept (b3)": []}
    variance_of = MarginVariance(net := supernet().eval())
    hardware = config.hardware.with_fault(fault)
    with hardware.without_faults().inject(net, seed=0), track("b3", len(genotypes)) as progress:
        for genotype in genotypes:
            parts = [variance_of(genotype, x, y, fault) for x, y in batches]
            margin, variance = (torch.cat(side) for side in zip(*parts, strict=True))
            found["clean accuracy"].append(float((margin > 0).double().mean()))
            found["mean variance (b3)"].append(-float(variance.double().mean()))
            found["margins kept (b3)"].append(float(kept(margin, variance).double().mean()))
            progress.advance()
    candidates = Candidates(InProcess(threads=1), supernet(), hardware, events=lambda *_, **__: None)
    with candidates.weights(seed_for(0, "scored draws")), track("measure", 2 * len(genotypes)) as progress:
        many = candidates.score(genotypes, batches, Terms(1.0, draws), done=progress.advance)
        one = candidates.score(genotypes, batches, Terms(1.0, 1, first_draw=10_000_000), done=progress.advance)
    scores = {name: np.array(values) for name, values in found.items()}
    return scores | {
        "one fault draw": np.array([s.faulty for s in one]),
        "faulty accuracy": np.array([s.faulty for s in many]),
        "measured clean accuracy": np.array([s.clean for s in many]),
    }


def taus(scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return tau of each score with faulty accuracy, and with what faults take of it: mean, low, high."""
    truth, found = scores["faulty accuracy"], {}
    loss = truth - scores["measured clean accuracy"]
    for name in ("margins kept (b3)", "mean variance (b3)", "clean accuracy", "one fault draw"):
        interval = correlation_interval(scores[name], truth)
        found[name] = [interval.mean, interval.low, interval.high]
    for name in ("margins kept (b3)", "mean variance (b3)"):
        score = scores[name] - (scores["clean accuracy"] if name.startswith("margins") else 0.0)
        interval = correlation_interval(score, loss)
        found[f"{name}, of the loss"] = [interval.mean, interval.low, interval.high]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished search")
    parser.add_argument("--genotypes", type=int, default=40, help="random genotypes (default: 40)")
    parser.add_argument("--draws", type=int, default=4, help="fault draws per image of the truth (default: 4)")
    parser.add_argument("--faults", nargs="+", choices=("crash", "mibb"), default=["crash", "mibb"])
    parser.add_argument("--crash-rate", type=float, default=0.05, help="of positions (default: 0.05)")
    parser.add_argument("--mac-error-rate", type=float, default=1e-3, help="of MiBB (default: 0.001)")
    parser.add_argument("--out", type=Path, default=Path("runs/bounds-study"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "fault-scores.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    figure = Figure(figsize=(8.6, 3.4), facecolor=plots.PAPER, layout="constrained")
    faults = {"crash": NeuronCrash(rate=options.crash_rate), "mibb": MiBB(mac_error_rate=options.mac_error_rate)}
    for name in options.faults:
        scores = measure(options.run, faults[name], options.genotypes, options.draws)
        result[name] = {"taus": taus(scores), "scores": {key: values.tolist() for key, values in scores.items()}}
        file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    for index, name in enumerate(result):
        scores = {key: np.array(values) for key, values in result[name]["scores"].items()}
        for score, (mean, low, high) in result[name]["taus"].items():
            print(
                f"{name}: {score}: tau {mean:.3f} ({low:.3f} to {high:.3f}), {len(scores['faulty accuracy'])} genotypes"
            )
        axes = figure.add_subplot(1, 2, index + 1)
        axes.plot(100 * scores["margins kept (b3)"], 100 * scores["faulty accuracy"], "o", color=plots.PALETTE[2])
        axes.set_title(f"{name}: predicted by b3, measured", loc="left", color=plots.INK, fontsize=10)
        axes.set_xlabel("margins kept (%)")
        axes.set_ylabel("faulty accuracy (%)")
        plots.bare(axes)
    plots.save(figure, options.out / "fault-scores")


if __name__ == "__main__":
    with told():
        main()
