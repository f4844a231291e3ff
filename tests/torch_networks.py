"""A residual network of PyTorch for the tests of convert, revert and fuse, and what they compare."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block as ResNet has it."""

    def __init__(self, before, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or before != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8), Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10),
    )  # fmt: skip


def kinds(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def steps(model, n=3, optimizer=None):
    """Train a little; return outputs, losses, and then what inference gives."""
    torch.manual_seed(1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    results = []
    for _ in range(n):
        x, target = torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        optimizer.step()
        results.append(loss.detach())
    with torch.no_grad():
        results.append(model.eval()(torch.randn(6, 3, 8, 8)))
    return results


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
