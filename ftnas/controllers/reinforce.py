"""The RNN controller trained by REINFORCE (FTT-NAS, sections 4.3, 4.4, 5.1; after ENAS, Pham et al. 2018)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ftnas.controllers.base import (
    CONTROLLERS,
    Choices,
    Controller,
    ControllerConfig,
    check_num,
    check_state,
    check_told,
    pack_state,
    restore_generator,
)
from ftnas.rng import generator
from ftnas.settings import Count, Positive, Rate
from ftnas.space.genotype import Genotype, decision_sizes
from ftnas.space.space import NUM_INPUTS, Space

SOURCE, PRIMITIVE, FUNCTION = "source", "primitive", "function"


class ReinforceConfig(ControllerConfig):
    """Settings of the RNN controller; the defaults are the paper's (section 5.1) and its released code's.

    Attributes:
        hidden_units: Of the LSTM.
        init_range: Weights begin uniform between -init_range and init_range.
        softmax_temperature: Divides the logits.
        tanh_constant: c, if given, then bounds them to c * tanh(logit).
        lr: Of Adam.
        baseline_momentum: Share of the moving average of rewards that stays at each update.
        entropy_coefficient: Weight of the entropy of the decisions in what is maximised.
        grad_clip: Bound of the gradient's L2 norm over all parameters; None leaves it.
    """

    name: Literal["reinforce"] = "reinforce"
    hidden_units: Count = 100
    init_range: Positive = 0.1
    softmax_temperature: Positive = 5.0
    tanh_constant: Positive | None = None
    lr: Positive = 1e-3
    baseline_momentum: Rate = 0.99
    entropy_coefficient: Annotated[float, Field(ge=0.0)] = 0.01
    grad_clip: Positive | None = 5.0


class CellPolicies(nn.Module):
    """One-layer LSTM policies, one per cell type, independent but stacked: one matrix product runs them all.

    With C cell types, V inputs (a start token, one per source, one per primitive), H hidden units and T
    decisions a cell (per inner node: source, source, primitive, primitive; then, where the space has functions, one
    on the function of the cell's weights), every parameter leads with C
    and no operation mixes cell types. The input of a step is the embedding of the decision before it;
    sources are scored by one linear map, of whose outputs a node sees those of earlier nodes, primitives by
    another, functions by a third; none has a bias (ENAS).

    Args:
        space: What to decide on.
        config: Settings of the controller.
        generator: Draws all parameters from U(-init_range, init_range).
    """

    def __init__(self, space: Space, *, config: ReinforceConfig, generator: torch.Generator) -> None:
        super().__init__()
        hidden, sources, primitives = config.hidden_units, space.nodes - 1, len(space.primitives)
        self.cells = len(space.cell_types)
        self.hidden = hidden
        self.temperature = config.softmax_temperature
        self.tanh_constant = config.tanh_constant
        self.num_inputs = 1 + sources + primitives

        def uniform(*shape: int) -> nn.Parameter:
            values = torch.empty(self.cells, *shape)
            return nn.Parameter(values.uniform_(-config.init_range, config.init_range, generator=generator))

        self.embedding = uniform(self.num_inputs, hidden)
        self.input_weight = uniform(hidden, 4 * hidden)
        self.hidden_weight = uniform(hidden, 4 * hidden)
        self.bias = uniform(1, 4 * hidden)
        self.source_head = uniform(hidden, sources)
        self.primitive_head = uniform(hidden, primitives)
        self.kinds = [kind for _ in range(NUM_INPUTS, space.nodes) for kind in (SOURCE, SOURCE, PRIMITIVE, PRIMITIVE)]
        if space.functions:
            self.function_head = uniform(hidden, len(space.functions))
            self.kinds.append(FUNCTION)
        self.num_choices = [size for row in decision_sizes(space) for size in row]
        self._first_input = [1 + sources if kind == PRIMITIVE else 1 for kind in self.kinds]

    def unroll(self, choose: Callable[[int, Tensor], Tensor], *, batch: int) -> tuple[Tensor, list[Tensor]]:
        """Make all T decisions, each conditioned on those before it.

        Args:
            choose: Given the step t in [0, T) and log-probabilities float [C, B, n_t], returns the choices,
                int64 [C, B] in [0, n_t).
            batch: B, the number of rollouts.

        Returns:
            The choices, int64 [C, B, T], and the log-probabilities of every step, T tensors float [C, B,
            n_t].
        """
        table = torch.baddbmm(self.bias, self.embedding, self.input_weight).flatten(0, 1)
        row = torch.arange(self.cells).unsqueeze(1) * self.num_inputs
        hidden = cell = table.new_zeros(self.cells, batch, self.hidden)
        token = row.expand(-1, batch)
        choices, log_probs = [], []
        for step, num in enumerate(self.num_choices):
            gates = torch.baddbmm(table[token], hidden, self.hidden_weight)
            keep, write, read = gates[..., : 3 * self.hidden].sigmoid().chunk(3, dim=-1)
            cell = keep * cell + write * gates[..., 3 * self.hidden :].tanh()
            hidden = read * cell.tanh()
            logits = torch.bmm(hidden, self._head(step, num)) / self.temperature
            if self.tanh_constant is not None:
                logits = self.tanh_constant * logits.tanh()
            log_probs.append(F.log_softmax(logits, dim=-1))
            choices.append(choose(step, log_probs[-1]))
            token = choices[-1] + (row + self._first_input[step])
        return torch.stack(choices, dim=-1), log_probs

    def _head(self, step: int, num: int) -> Tensor:
        """Return the map that scores the choices of a step, float [C, H, num]."""
        kind = self.kinds[step]
        if kind == SOURCE:
            return self.source_head[..., :num]
        return self.primitive_head if kind == PRIMITIVE else self.function_head

    @torch.no_grad()
    def sample(self, num: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Draw ``num`` rollouts; shapes as ``unroll`` returns them, without gradients.

        Choices are Gumbel maxima, so the number of random values drawn depends on ``num`` only.
        """
        shape = (len(self.num_choices), self.cells, num, max(self.num_choices))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform))

        def choose(step: int, log_probs: Tensor) -> Tensor:
            return (log_probs + gumbel[step, ..., : log_probs.shape[-1]]).argmax(dim=-1)

        return self.unroll(choose, batch=num)

    def score(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of given decisions (teacher forcing).

        Args:
            choices: int64 [C, B, T].

        Returns:
            log pi of each decision given those before it, float [C, B, T], and the entropy in nats of the
            distribution it was drawn from, float [C, B, T]. Both carry gradients.
        """
        _, rows = self.unroll(lambda step, _: choices[..., step], batch=choices.shape[1])
        chosen = [row.gather(-1, choices[..., step : step + 1]).squeeze(-1) for step, row in enumerate(rows)]
        entropies = [-(row.exp() * row).sum(dim=-1) for row in rows]
        return torch.stack(chosen, dim=-1), torch.stack(entropies, dim=-1)


@CONTROLLERS.register("reinforce")
class ReinforceController(Controller):
    """LSTM policies updated by REINFORCE with a moving-average baseline and an entropy bonus.

    One ``tell`` is one Adam step on, with rewards R of the rollouts a told and the baseline b,

        loss = -mean_a[(R - b) log pi(a)] - entropy_coefficient * mean_a[sum over decisions of H(decision |
        before)]

    (Algorithm 1, line 20). b starts as the mean reward of the first ``tell``; after the advantage is taken
    it moves to ``momentum * b + (1 - momentum) * mean R``. log pi is computed anew in ``tell``, so that
    genotypes of any origin can be told; their rewards are not reweighted for not being drawn from pi. It
    runs on the CPU.
    """

    Config = ReinforceConfig
    config: ReinforceConfig

    def __init__(self, config: ReinforceConfig, space: Space | Choices, *, seed: int) -> None:
        super().__init__(config, space, seed=seed)
        if not isinstance(space, Space):
            raise ValueError("controller 'reinforce' decides on cells only; take random or evolution")
        self.space = space
        stream = generator(seed, "controller", config.name, "init")
        self.policies = CellPolicies(space, config=config, generator=stream)
        self.optimizer = torch.optim.Adam(self.policies.parameters(), lr=config.lr)
        self.baseline = 0.0
        self.num_updates = 0
        self._max_entropy = torch.tensor(self.policies.num_choices, dtype=torch.float32).log()
        self._seed = seed

    def ask(self, num: int) -> list[Genotype]:
        """Draw ``num`` genotypes from the policies, independently."""
        check_num(num)
        choices, _ = self.policies.sample(num, generator=self.generator)
        types = self.space.cell_types
        rollouts = choices.transpose(0, 1).tolist()
        rows = [[self._rows(cell) for cell in cells] for cells in rollouts]
        return [Genotype.from_decisions(self.space, dict(zip(types, cells, strict=True))) for cells in rows]

    def _rows(self, flat: list[int]) -> list[list[int]]:
        """Return the T decisions of a cell in rows, as genotypes have them."""
        return [flat[start : start + 4] for start in range(0, len(flat), 4)]  # a function is a row of its own

    def encode(self, genotypes: Sequence[Genotype]) -> Tensor:
        """Return the decisions of B genotypes, int64 [C, B, T]."""
        decisions = [genotype.to_decisions(self.space) for genotype in genotypes]
        types = self.space.cell_types
        return torch.tensor([[[value for row in one[cell] for value in row] for one in decisions] for cell in types])

    def tell(self, genotypes: Sequence[Genotype], rewards: Sequence[float]) -> dict[str, float]:
        """Take one step on the rewards.

        Returns:
            ``reward`` (mean), ``baseline`` (the one used), ``advantage`` (mean), ``loss``, ``grad_norm``
            (before clipping), ``log_prob`` (of a genotype, mean), and of the policies before the step
            ``entropy``, ``entropy_normal``, ``entropy_reduce``: mean over decisions of H / log(number of
            choices), in [0, 1], 1 for a uniform policy; decisions with one choice left out.
        """
        numbers = check_told(genotypes, rewards, self.choices)
        reward = sum(numbers) / len(numbers)
        baseline = reward if self.num_updates == 0 else self.baseline
        log_probs, entropies = self.policies.score(self.encode(genotypes))
        advantages = torch.tensor(numbers, dtype=torch.float64).sub_(baseline).to(log_probs.dtype)
        log_prob = log_probs.sum(dim=(0, 2))
        entropy = entropies.sum(dim=(0, 2)).mean()
        loss = -(advantages * log_prob).mean() - self.config.entropy_coefficient * entropy
        grad_norm = self._step(loss)
        self.baseline = self.config.baseline_momentum * baseline + (1.0 - self.config.baseline_momentum) * reward
        self.num_updates += 1
        return {
            "reward": reward,
            "baseline": baseline,
            "advantage": reward - baseline,
            "loss": loss.item(),
            "grad_norm": grad_norm,
            "log_prob": log_prob.mean().item(),
            **self._relative_entropies(entropies.detach()),
        }

    def _step(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.config.grad_clip if self.config.grad_clip is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.policies.parameters(), limit).item()
        self.optimizer.step()
        return grad_norm

    def _relative_entropies(self, entropies: Tensor) -> dict[str, float]:
        """Return the mean H / log(n) over rollouts and decisions, of [C, B, T], in all and per cell."""
        free = self._max_entropy > 0
        cells = (entropies.mean(dim=1)[:, free] / self._max_entropy[free]).mean(dim=1).tolist()
        each = {f"entropy_{cell}": value for cell, value in zip(self.space.cell_types, cells, strict=True)}
        return {"entropy": sum(cells) / len(cells), **each}

    @torch.no_grad()
    def policy_summary(self, *, num: int = 256) -> dict[str, float]:
        """Describe the policies as they are now; moves no state.

        Args:
            num: Rollouts to average over. They come from a stream of their own, the same at every call.

        Returns:
            ``operator/CELL/PRIMITIVE``, the probability that an edge of the cell carries the primitive,
            summing to 1 over primitives (mean of exact conditional probabilities), ``saturation/CELL/FUNCTION``
            likewise where the space has functions, and the entropies that ``tell`` returns.
        """
        stream = generator(self._seed, "controller", self.config.name, "summary")
        _, rows = self.policies.sample(num, generator=stream)
        entropies = torch.stack([-(row.exp() * row).sum(dim=-1) for row in rows], dim=-1)
        shares: dict[str, float] = {}
        for label, kind, names in (
            ("operator", PRIMITIVE, self.space.primitives),
            ("saturation", FUNCTION, self.space.functions),
        ):
            steps = [row for row, own in zip(rows, self.policies.kinds, strict=True) if own == kind]
            if steps:
                means = torch.stack(steps).exp().mean(dim=(0, 2)).tolist()
                for cell, row in zip(self.space.cell_types, means, strict=True):
                    shares |= {f"{label}/{cell}/{name}": share for name, share in zip(names, row, strict=True)}
        return {**shares, **self._relative_entropies(entropies)}

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, Adam's moments, the baseline, the number of updates and the stream."""
        moments = self.optimizer.state_dict()["state"]
        return pack_state(
            self,
            policies={name: value.clone() for name, value in self.policies.state_dict().items()},
            adam={index: {name: value.clone() for name, value in one.items()} for index, one in moments.items()},
            baseline=self.baseline,
            num_updates=self.num_updates,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; one of other ``hidden_units`` is refused."""
        check_state(self, state, keys=("policies", "adam", "baseline", "num_updates"))
        own = self.policies.state_dict()
        for name, value in own.items():
            given = state["policies"].get(name)
            if given is None or given.shape != value.shape:
                found = "nothing" if given is None else list(given.shape)
                raise ValueError(f"controller state: {name} must have shape {list(value.shape)}, got {found}")
        restore_generator(self, state)
        self.policies.load_state_dict(state["policies"])
        groups = self.optimizer.state_dict()["param_groups"]
        # torch's optimizer would go on with the given tensors themselves, and change them
        self.optimizer.load_state_dict({"state": copy.deepcopy(state["adam"]), "param_groups": groups})
        self.baseline = float(state["baseline"])
        self.num_updates = int(state["num_updates"])
