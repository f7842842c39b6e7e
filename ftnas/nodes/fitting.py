"""Training of the variants of a split network."""

from __future__ import annotations

import torch
from torch.nn import functional

from ftnas import rng
from ftnas.data import ImageSet, load
from ftnas.nodes.network import Failout, SplitNetwork
from ftnas.nodes.study import NodesConfig, Variant, model_file
from ftnas.rundir import Folder


def build(config: NodesConfig, variant: Variant, images: ImageSet, *, seed: int) -> SplitNetwork:
    """Build one variant; the blocks start from the same weights in all variants of a seed."""
    partition = config.partition.without_skips() if variant.mode == "vanilla" else config.partition
    links = partition.links()
    rates = config.settings.get(variant.weights_setting, {})
    with rng.isolated(seed, "nodes", "blocks"):
        blocks = config.model.blocks(images.shape, num_classes=images.num_classes)
    with rng.isolated(seed, "nodes", "matches"):
        return SplitNetwork(
            blocks,
            partition=partition,
            shape=images.shape,
            mode=variant.mode,
            matching=config.matching,
            weights=variant.weights.weights(links, failure_rates=rates, seed=seed),
        )


def fit(network: SplitNetwork, images: ImageSet, config: NodesConfig, *, failout: Failout | None, seed: int) -> int:
    """Train by Adam on the cross-entropy, the nodes of a mask per batch shut down.

    Returns:
        How many batches were left out because no information reached the top.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    masks = rng.generator(seed, "nodes", "failout")
    left_out = 0
    network.train()
    for epoch in range(config.epochs):
        for inputs, labels in images.batches(
            config.batch_size, seed=seed, epoch=epoch, augment=config.augment, drop_last=True
        ):
            down = failout.sample(network.partition, generator=masks) if failout else frozenset()
            logits = network(inputs, down)
            if logits is None:
                left_out += 1
                continue
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    return left_out


def train_all(config: NodesConfig, folder: Folder) -> None:
    """Train every variant and seed that has no model file yet."""
    images = load(config.data, "train")
    for name, variant in config.variants.items():
        for seed in range(config.seed, config.seed + config.seeds):
            if folder.file(model_file(name, seed)).exists():
                continue
            network = build(config, variant, images, seed=seed)
            left_out = fit(network, images, config, failout=variant.failout, seed=seed)
            folder.save(model_file(name, seed), {"state": network.state_dict(), "left_out": left_out})
            print(f"trained {name}, seed {seed}; batches without information: {left_out}", flush=True)


def trained(folder: Folder, name: str, seed: int, network: SplitNetwork) -> None:
    """Load the weights of a trained variant into its network; ValueError if it is not trained yet."""
    if not folder.file(model_file(name, seed)).exists():
        raise ValueError(f"{name}, seed {seed} is not trained yet; run ftnas nodes train first")
    network.load_state_dict(folder.load(model_file(name, seed), keys=("state",))["state"])
