"""Make the embedded data and the classifier whose features the Frechet distance uses.

    python -m lightning_prune.assets.build data --root <folder with the idx files>
    python -m lightning_prune.assets.build classifier --root <folder with the idx files>

The two networks are made by `lightning_prune fit --config configs/pretrain/fashion_{dit,unet}.yaml`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lightning_prune.data.fashion import CLASSES, EMBEDDED_FILE, FashionMNIST, balanced_order, pad_to_32, read_idx
from lightning_prune.metrics.extractors.fashion import EXTRACTOR_FOLDER, FashionClassifier, save_classifier
from lightning_prune.seeds import derive

TRAIN_PER_CLASS = 2000


def build_data(root: str) -> None:
    """Write the class-balanced part of Fashion-MNIST that ships with the package."""
    source = FashionMNIST(root=root)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "reference", "held_out"):
        data = source.split(split)
        order = balanced_order(data.labels)
        if split == "train":
            order = order[: TRAIN_PER_CLASS * len(CLASSES)]
        arrays[f"{split}_images"] = data.images[order, 0, 2:-2, 2:-2].contiguous().numpy()
        arrays[f"{split}_labels"] = data.labels[order].to(torch.uint8).numpy()
    EMBEDDED_FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(EMBEDDED_FILE, allow_pickle=False, **arrays)
    print(f"{EMBEDDED_FILE}: {EMBEDDED_FILE.stat().st_size / 1e6:.1f} MB")


def build_classifier(root: str, epochs: int, seed: int) -> None:
    """Train the extractor's classifier on all 60,000 training images and write it with its test accuracy."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    source = FashionMNIST(root=root)
    train = source.split("train")
    network, batch = FashionClassifier().to(memory_format=torch.channels_last), 128
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derive(seed, epoch))
        order = torch.randperm(len(train), generator=generator)[: len(train) // batch * batch]
        for indices in order.view(-1, batch):
            loss = cross_entropy(network(train.images[indices]), train.labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}", flush=True)
    reached = accuracy(network.eval(), root)
    save_classifier(network, EXTRACTOR_FOLDER, reached)
    print(f"{EXTRACTOR_FOLDER}: test accuracy {reached:.4f}")


@torch.no_grad()
def accuracy(network: FashionClassifier, root: str) -> float:
    """Fraction of all 10,000 test images classified as their label."""
    images, labels = pad_to_32(read_idx(Path(root), "test")), read_idx(Path(root), "test_labels").long()
    hits: int = sum(
        (network(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("data", "classifier"))
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.part == "data":
        build_data(arguments.root)
    else:
        build_classifier(arguments.root, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
