"""Small classification problems with a signal, for certificates."""

import torch
from torch import nn

import deepspectra as ds


def data(num=1500, seed=0):
    """Points of the plane and three more dimensions, in two classes that a line parts but for one point in twenty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    return x, torch.where(torch.rand(num, generator=generator) < 0.05, 1 - y, y)


def images(num=600, seed=0):
    """Images (1, 6, 6) of three classes: where a bright square stands."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(num, 1, 6, 6, generator=generator)
    y = torch.randint(3, (num,), generator=generator)
    for k in range(num):
        x[k, 0, 2 * int(y[k]) : 2 * int(y[k]) + 2, 1:4] += 1
    return x, y


def mlp(inputs=5, classes=2, width=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def problem(num=1500):
    return ds.Problem(mlp(), data(num))


class Kept(dict):
    """A store in memory that fails after so many writes."""

    def __init__(self, fails_after=10**9):
        super().__init__()
        self.left = fails_after

    def read(self, name):
        return self.get(name)

    def write(self, name, value):
        self[name] = value
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.shared(self.shared(x).relu()))
