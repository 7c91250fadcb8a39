"""What the small experiments of the specifications run on: real digits, and perceptrons trained on them."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

TRAINED_ON = 1297


@functools.cache
def digits():
    """All images with values in [0, 1] and their labels, in a random order; the first `TRAINED_ON` are for training."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.data, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]


def batches(x, y, size=64):
    return list(zip(x.split(size), y.split(size), strict=True))


def trained_perceptron(seed, *widths, x, y, epochs=25):
    """A perceptron with ReLU between its layers, trained by Adam."""
    torch.manual_seed(seed)
    layers = [part for n, m in itertools.pairwise(widths) for part in (nn.Linear(n, m), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            adam.step()
    return model


def accuracy(model, x, y):
    """In percent."""
    return 100 * (model(x).argmax(1) == y).double().mean().item()
