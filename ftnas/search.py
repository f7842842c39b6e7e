"""Algorithm 1 of FTT-NAS: shared weights and controller trained in turn, then one genotype derived."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftnas import devices
from ftnas.branches import parts_of_a_step
from ftnas.candidates import Candidates, Terms, num_scored, scored
from ftnas.controllers import Controller, RandomConfig, create_controller
from ftnas.data import ImageSet
from ftnas.derive import derive
from ftnas.faults.hardware import Hardware, check_alpha
from ftnas.faults.joint import HALVES
from ftnas.models import check_state
from ftnas.plots import draw_genotype, pixels
from ftnas.pool import PoolConfig
from ftnas.progress import say, track
from ftnas.ranks import Ranks
from ftnas.rng import generator, isolated, seed_for
from ftnas.rundir import Folder
from ftnas.search_settings import SearchConfig
from ftnas.space import Genotype, Space, Supernet, load_space
from ftnas.train import CHECKPOINT, FaultTolerantLoss, check_finite, finite_means, move, tell_unhit
from ftnas.workers import open_pool

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRIALS = "trials.jsonl"
UPDATES = "updates.jsonl"
EPOCHS = "epochs.jsonl"
_SAVED = ("epoch", "supernet", "optimizer", "scheduler", "controller", "uniform", "offsets")
PICTURES = 10
"""Genotypes that a search draws for TensorBoard along the way, the winner not counted."""
COLLAPSED = 0.05
"""Relative entropy of the controller under which it has all but stopped exploring."""


def _draw(board: SummaryWriter, tag: str, genotype: Genotype, epoch: int) -> None:
    board.add_image(tag, pixels(draw_genotype(genotype.to_dict(), title=f"epoch {epoch}")), epoch, dataformats="HWC")


def _reward_text(record: dict[str, Any]) -> str:
    reward = record.get("controller/reward")
    return "warm-up" if reward is None else f"reward {reward:.3f}"


class Search:
    """One search over one space on one data split; `run` carries it out or goes on with it.

    Args:
        config: The search's settings.
        hardware: Faults and number formats of weight steps and rewards.
        weights_images: Split that trains the shared weights, on the device.
        controller_images: Split that gives rewards, on the device.
        seed: Of everything random in the search.
        folder: Where its files go.
        pool: Who scores the candidates.
        title: Name on the progress bar.
        ranks: The place of this process among the ``config.ranks`` that train the shared weights.

    Raises:
        ValueError: Faults are weighed that are not there, or a split is smaller than a batch.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        hardware: Hardware,
        weights_images: ImageSet,
        controller_images: ImageSet,
        seed: int,
        folder: Folder,
        pool: PoolConfig | None = None,
        title: str = "search",
        ranks: Ranks | None = None,
    ) -> None:
        check_alpha(config.weights.alpha_l, hardware, f"{title}.weights.alpha_l")
        check_alpha(config.alpha_r, hardware, f"{title}.alpha_r")
        config.weights.compute.check(hardware.formats(), f"{title}.weights.compute")
        config.weights.compute.check_device(
            weights_images.device, f"{title}.weights.compute", obstacle="each here trains another path"
        )
        self.config = config
        self.hardware = hardware
        self.space: Space = load_space(config.space)
        self._weights_images = weights_images
        self._controller_images = controller_images
        self._seed = seed
        self._folder = folder
        self._pool = pool or PoolConfig()
        self._title = title
        self._ranks = ranks or Ranks()
        if self._ranks.size != config.ranks:
            raise ValueError(f"{title}.ranks={config.ranks}, and {self._ranks.size} take part; use ftnas.parallel")
        self._num_steps = weights_images.num_images // (config.weights.batch_size * config.ranks)
        if self._num_steps == 0:
            times = f" times {title}.ranks={config.ranks}" if config.ranks > 1 else ""
            raise ValueError(
                f"{title}.weights.batch_size={config.weights.batch_size}{times} is above the "
                f"{weights_images.num_images} images of the weights split"
            )
        device = weights_images.device
        with isolated(seed, "init"):
            self.supernet = Supernet(
                self.space,
                num_classes=len(weights_images.classes),
                in_channels=weights_images.shape[0],
                dropout=config.dropout,
            ).to(device)
        config.limits.apply(self.supernet)
        self.controller: Controller = create_controller(config.controller, self.space, seed=seed)
        self._uniform = create_controller(RandomConfig(), self.space, seed=seed_for(seed, "uniform"))
        self._optimizer = config.weights.optimizer(self.supernet)
        self._scheduler = config.weights.scheduler(self._optimizer, config.epochs)
        weights = config.weights
        if config.joint_forwards:
            self._check_joint(device)
        self._loss = FaultTolerantLoss(
            self.supernet, alpha_l=weights.alpha_l, compute=weights.compute, joint=config.joint_forwards
        )
        self._batch = config.controller_batch or config.weights.batch_size
        self._passes = num_scored(controller_images.num_images, self._batch)
        if self._passes == 0:
            raise ValueError(f"{title}.split leaves one image for rewards, and batch statistics need more; lower it")
        self._num_updates = config.controller_steps or self._passes
        self._best: Genotype | None = None  # of the last controller epoch

    def _check_joint(self, device: torch.device) -> None:
        if devices.is_readable(device):
            raise ValueError(f"{self._title}.joint_forwards is for GPUs, and this runs on {device}; set it to false")
        masks = self.config.weights.mask_gradients
        injection = self.hardware.inject(self.supernet, seed=0, errors="soft", mask_gradients=masks)
        obstacle = injection.joint.obstacle()
        if obstacle is not None:
            raise ValueError(f"{self._title}.joint_forwards: {obstacle}; set it to false")

    def run(self) -> Genotype:
        """Search, derive and return the winner; what is done already is not done again."""
        first = self._restore()
        self._tell_population()
        with open_pool(self._pool, events=self._folder.events) as pool:
            candidates = Candidates(
                pool, self.supernet, self.hardware, events=self._folder.events, joint=self.config.joint_forwards
            )
            return self._run(first, candidates)

    def follow(self) -> None:
        """Take part, on a rank above 0, in the weight steps of rank 0, which does all the rest in `run`."""
        for epoch in range(self._restore(), self.config.epochs):
            self._weights_epoch(epoch)
            self._scheduler.step()

    def _run(self, first: int, candidates: Candidates) -> Genotype:
        board = self._folder.tensorboard(purge_step=first)
        silent = math.inf if self._ranks.size > 1 else 0.0  # the process that started the ranks shows it
        with track(self._title, self.config.epochs, done=first, after_s=silent) as progress:
            for epoch in range(first, self.config.epochs):
                record: dict[str, Any] = {"epoch": epoch, **self._weights_epoch(epoch)}
                if epoch == first and self.config.weights.alpha_l > 0.0:
                    tell_unhit(self._title, record)
                if epoch >= self.config.warmup_epochs:
                    record |= self._controller_epoch(epoch, candidates)
                self._scheduler.step()
                self._folder.journal(EPOCHS).append(record)
                for name, value in record.items():
                    if value is None:
                        continue
                    board.add_scalar(name if "/" in name else f"weights/{name}", value, epoch)
                if self._best is not None and (epoch + 1) % max(1, self.config.epochs // PICTURES) == 0:
                    _draw(board, "genotype/best of the epoch", self._best, epoch)
                self._save(epoch + 1)
                progress.advance(f"loss {record['loss']:.3f}  {_reward_text(record)}")
        winner = derive(
            self.controller,
            self.supernet,
            candidates=candidates,
            config=self.config.derive,
            limits=self.config.limits,
            weights=self.config.weights,
            hardware=self.hardware,
            weights_images=self._weights_images,
            controller_images=self._controller_images,
            alpha_r=self.config.alpha_r,
            batch_size=self._batch,
            seed=self._seed,
            folder=self._folder,
            title=self._title,
        )
        _draw(board, "genotype/winner", winner, self.config.epochs)
        return winner

    def _weights_epoch(self, epoch: int) -> dict[str, Any]:
        """Train the shared weights for one pass over their split (lines 6-13)."""
        config, ranks = self.config.weights, self._ranks
        images = self._weights_images
        genotypes = ranks.share(lambda: self._genotypes(epoch))[ranks.rank :: ranks.size]
        injection = self.hardware.inject(
            self.supernet,
            seed=seed_for(self._seed, "weights"),
            errors="soft",
            mask_gradients=config.mask_gradients,
            draw_on="device",
        )
        self.supernet.train()
        sums = torch.zeros(3, device=images.device)
        batches = images.batches(
            config.batch_size,
            seed=seed_for(self._seed, "weights"),
            epoch=epoch,
            augment=config.augment,
            drop_last=True,
            share=(ranks.rank, ranks.size),
        )
        # primitives of the user's own may draw from the global generator, as nn.Dropout does
        with injection, config.compute.steps(), isolated(self._seed, "weights", epoch, ranks.rank):
            parameters = list(self.supernet.parameters())
            sides = parts_of_a_step(self.supernet, graphed=False)
            for index, ((x, y), genotype) in enumerate(zip(batches, genotypes, strict=True)):
                # numbers what is trained on, in the order of the images, whichever rank does it
                number = (epoch * self._num_steps + index) * ranks.size + ranks.rank
                injection.draw = number
                forward = self._forward(genotype, number)
                losses = self._loss.gradients(forward, injection, x, y, parameters, sides)
                ranks.average_gradients(parameters)
                move(parameters, self._optimizer, config.grad_clip)
                sums += torch.stack([losses.total, losses.clean, losses.faulty])
        means = finite_means(ranks.total(sums), self._num_steps * ranks.size, where=f"search epoch {epoch}")
        check_finite(self.supernet, where=f"search epoch {epoch}")
        ranks.check_equal(list(self.supernet.parameters()), where=f"search epoch {epoch}")
        hits = ranks.total(torch.tensor(injection.record.hits, device=images.device)).item()
        lr = float(self._optimizer.param_groups[0]["lr"])
        return {"lr": lr, "loss": means[0], **self._loss.named(*means[1:]), "hits": int(hits)}

    def _genotypes(self, epoch: int) -> list[Genotype]:
        """Return what each batch of a weights epoch trains, in order; the controller does not move within one."""
        source = self._uniform if epoch < self.config.warmup_epochs else self.controller
        return [source.ask(1)[0] for _ in range(self._num_steps * self._ranks.size)]

    def _forward(self, genotype: Genotype, step: int) -> Any:
        """Return the genotype's path as a function of images; clean and faulty forward share the dropout mask."""

        def forward(images: Tensor) -> Tensor:
            stream = generator(self._seed, "dropout", step, device=images.device)
            copies = HALVES if self._loss.joint else 1
            return self.supernet(images, genotype, dropout_generator=stream, copies=copies)

        return forward

    def _controller_epoch(self, epoch: int, candidates: Candidates) -> dict[str, Any]:
        """Ask, evaluate and tell (lines 14-21)."""
        trials, updates = self._folder.journal(TRIALS), self._folder.journal(UPDATES)
        sums: dict[str, float] = {}
        best = -1.0
        with candidates.weights(seed_for(self._seed, "rewards")):
            for index, batch in enumerate(self._reward_batches(epoch)):
                update, draws = epoch * self._num_updates + index, self.config.reward_draws
                genotypes = self.controller.ask(self.config.rollouts)
                scores = candidates.score(
                    genotypes, [batch], Terms(self.config.alpha_r, draws, first_draw=update * draws)
                )
                told = self.controller.tell(genotypes, [result.reward for result in scores])
                for rollout, (genotype, result) in enumerate(zip(genotypes, scores, strict=True)):
                    if result.reward > best:
                        best, self._best = result.reward, genotype
                    trials.append(
                        {
                            "epoch": epoch,
                            "update": update,
                            "rollout": rollout,
                            "clean": result.clean,
                            "faulty": result.faulty,
                            "reward": result.reward,
                            "genotype": genotype.to_dict(),
                        }
                    )
                updates.append({"epoch": epoch, "update": update, **told})
                for name, value in told.items():
                    sums[name] = sums.get(name, 0.0) + value
        means = {name: value / self._num_updates for name, value in sums.items()}
        self._watch_entropy(epoch, means.get("entropy"))
        summarise = getattr(self.controller, "policy_summary", None)  # only a controller with a policy has one
        means |= summarise() if summarise is not None else {}
        return {f"controller/{name}": value for name, value in means.items()}

    def _reward_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one controller epoch, from as many passes over the split as it needs."""
        left, done = self._num_updates, 0
        while left > 0:
            passes = epoch * -(-self._num_updates // self._passes) + done
            order = seed_for(self._seed, "controller")
            augment = self.config.weights.augment
            split = self._controller_images
            for batch in scored(split.batches(self._batch, seed=order, epoch=passes, augment=augment), self._batch):
                yield batch
                left -= 1
                if left == 0:
                    return
            done += 1

    def _tell_population(self) -> None:
        """Say where a population never fills: until then evolution draws at random."""
        population = getattr(self.config.controller, "population_size", None)
        told = (self.config.epochs - self.config.warmup_epochs) * self._num_updates * self.config.rollouts
        if population is not None and told <= population:
            say(
                f"warning: {self._title}.controller.population_size={population}, and {told} candidates are scored in "
                "all: every one is drawn at random, as in a random search; lower it"
            )

    def _watch_entropy(self, epoch: int, entropy: float | None) -> None:
        if entropy is not None and entropy < COLLAPSED:
            message = (
                f"{self._title}: the controller's entropy fell to {entropy:.3f} of its maximum in epoch {epoch}: "
                "it has stopped exploring; raise controller.entropy_coefficient or lower controller.lr"
            )
            say(f"warning: {message}")
            self._folder.events("entropy_collapse", epoch=epoch, entropy=entropy)

    def _save(self, epochs_done: int) -> None:
        state = {
            "epoch": epochs_done,
            "supernet": self.supernet.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "controller": self.controller.state_dict(),
            "uniform": self._uniform.state_dict(),
            "offsets": {name: self._folder.journal(name).offset for name in (TRIALS, UPDATES, EPOCHS)},
        }
        self._folder.save(CHECKPOINT, state)

    def _restore(self) -> int:
        """Go back to the folder's checkpoint, if any, and return the number of epochs that it holds."""
        state = self._ranks.share(self._checkpoint)
        if state is None:
            return 0
        self.supernet.load_state_dict(state["supernet"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.controller.load_state_dict(state["controller"])
        self._uniform.load_state_dict(state["uniform"])
        if self._ranks.first:
            self._folder.events("resumed", epoch=state["epoch"])
        return int(state["epoch"])

    def _checkpoint(self) -> Any:
        """Read the folder's checkpoint, None without one, and cut the journals back to it."""
        path, state = self._folder.file(CHECKPOINT), None
        if path.exists():
            state = self._folder.load(CHECKPOINT, keys=_SAVED)
            check_state(self.supernet.state_dict(), state["supernet"], where=str(path))
        for name in (TRIALS, UPDATES, EPOCHS):
            self._folder.journal(name).truncate(state["offsets"][name] if state else 0)
        return state
