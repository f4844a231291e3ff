"""A small residual network, trained with PyTorch's batch norm and with fastbn's: the same losses, in less time.

Three models start from the same weights and see the same batches: PyTorch's own, the same after `convert`, and what
`fuse` makes of it. Then their steps are timed, in turns, and how much of them batch norm takes, forward and backward.
`fuse` also takes over additions and activations, so the last column counts these too. Images are made up: one pattern
per class, and noise::

    pip install ".[torch]"                     # in a clone of fastbn
    python torch_residual_network.py           # quick: so few steps that times say little
    python torch_residual_network.py --full    # the numbers of docs/pytorch.md
    python torch_residual_network.py --full --wide  # four times the channels, half the batch
"""

import copy
import sys
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

import fastbn.torch

FULL = "--full" in sys.argv
# Images, batches and channels of the ResNets for CIFAR-10 (He et al., 2015), with one block at each size.
STEPS, ROUNDS, BATCH = (10, 30, 128) if FULL else (4, 2, 16)
SIZE, CHANNELS, CLASSES = 32, (16, 32, 64), 10
if "--wide" in sys.argv:
    STEPS, ROUNDS, BATCH, CHANNELS = 3, 8, 64, (64, 128, 256)


class Sum(nn.Module):
    """A module of its own, so that it can be timed."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Add."""
        return a + b


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.sum, self.relu = Sum(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the convolutions make of x to x."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self.sum(out, self.shortcut(x)))


def network() -> nn.Module:
    """Return a network of eight layers: a ResNet for images as small as CIFAR's, with a block at each size."""
    torch.manual_seed(0)
    a, b, c = CHANNELS
    blocks = (Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
    first = (nn.Conv2d(3, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, CLASSES))


def batches(number: int, form: torch.memory_format) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images and their classes."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)
    result = []
    for _ in range(number):
        target = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        result.append(((patterns[target] + 2 * noise).contiguous(memory_format=form), target))
    return result


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> float:
    """Take a training step, and return the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


class Clock:
    """Sums what modules of some kinds take in a step: forward by hooks, backward by hooks of their autograd node."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        self.total = self.start = 0.0
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(self.enter)
                module.register_forward_hook(self.leave)

    def enter(self, *_: object) -> None:
        """Begin."""
        self.start = perf_counter()

    def leave(self, *arguments: object) -> None:
        """End; after a module's forward, watch its backward."""
        self.total += perf_counter() - self.start
        node = getattr(arguments[-1], "grad_fn", None)
        if node is not None:
            node.register_prehook(self.enter)
            node.register_hook(self.leave)

    def read(self) -> float:
        """Return the milliseconds since the last look."""
        total, self.total = self.total * 1e3, 0.0
        return total


def main() -> None:
    """Train, compare, time."""
    for form in (torch.contiguous_format, torch.channels_last):
        plain = network().to(memory_format=form)
        models = {
            "torch": plain,
            "convert": fastbn.torch.convert(copy.deepcopy(plain)),
            "fuse": fastbn.torch.fuse(copy.deepcopy(plain)),
        }
        optimizers = {name: torch.optim.SGD(model.parameters(), 0.05, 0.9) for name, model in models.items()}
        data = batches(STEPS, form)
        losses = {name: [step(model, optimizers[name], *batch) for batch in data] for name, model in models.items()}
        print(
            f"\n{str(form).removeprefix('torch.')}: losses {losses['torch'][0]:.4f} to {losses['torch'][-1]:.4f}",
            end="",
        )
        differences = [abs(a - b) for name in models for a, b in zip(losses[name], losses["torch"])]
        print(f", largest difference between the models {max(differences):.1e}")
        assert max(differences) < 1e-3

        norms = {name: Clock(model, (nn.BatchNorm2d,)) for name, model in models.items()}
        others = {name: Clock(model, (nn.ReLU, Sum)) for name, model in models.items()}
        rows: dict[str, list[list[float]]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                for _ in range(2):  # the first one finds the caches as another model left them
                    norms[name].read(), others[name].read()
                    start = perf_counter()
                    step(model, optimizers[name], *data[0])
                    whole = (perf_counter() - start) * 1e3
                norm, other = norms[name].read(), others[name].read()
                rows[name].append([whole, norm, norm + other])
        print("                step ms   batch norm ms   with additions and activations")
        medians = {name: [median(column) for column in zip(*values)] for name, values in rows.items()}
        for name, row in medians.items():
            ratios = [f"{value:8.2f} {medians['torch'][i] / value:5.2f}x" for i, value in enumerate(row)]
            print(f"{name:8s} {'  '.join(ratios)}")


if __name__ == "__main__":
    main()
