"""Train a small residual network with PyTorch's batch norm and with fastbn's: the same losses, in less time.

Three models start from the same weights and see the same batches: PyTorch's own, the same after `convert`, and what
`fuse` makes of it. Then one step of each is timed, in turns, and PyTorch's profiler says how much of it batch norm
took, forward and backward; for `fuse` that includes the additions and activations that it took over, so these are
counted for the others too in the last column. Images are made up: one pattern per class, and noise.

    pip install "fastbn[torch]"
    python torch_residual_network.py           # quick: fewer steps
    python torch_residual_network.py --full    # the numbers of docs/pytorch.md
"""

import copy
import sys
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

import fastbn.torch

FULL = "--full" in sys.argv
STEPS, ROUNDS = (20, 15) if FULL else (6, 3)
BATCH, SIZE, CLASSES = 64, 32, 10
# Events of the profiler: the modules' own (see `watched`), and nodes of autograd.
NORMS = ("batch norm", "evaluate_function: NativeBatchNormBackward0", "evaluate_function: FastBatchNormBackward")
OTHERS = ("aten::relu_", "aten::add_", "evaluate_function: ReluBackward0", "evaluate_function: AddBackward0")


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the convolutions make of x to x."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def network() -> nn.Module:
    """Return a network of eight layers, as for CIFAR."""
    torch.manual_seed(0)
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    first = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


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


def watched(model: nn.Module) -> None:
    """Let the profiler see what batch norm modules take, with all that is around their kernels."""
    running = []

    def enter(*_: object) -> None:
        running.append(record_function("batch norm"))
        running[-1].__enter__()

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def shares(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> list[float]:
    """Return how long batch norm took in a step, and batch norm, additions and activations, in milliseconds."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(model, optimizer, x, target)
    events = profiler.key_averages()
    times = [sum(e.cpu_time_total for e in events if e.key.endswith(names)) / 1e3 for names in (NORMS, OTHERS)]
    return [times[0], sum(times)]


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
        print(f"\n{str(form).removeprefix('torch.')}: losses {losses['torch'][0]:.4f} to {losses['torch'][-1]:.4f}", end="")
        differences = [abs(a - b) for name in models for a, b in zip(losses[name], losses["torch"])]
        print(f", largest difference between the models {max(differences):.1e}")
        assert max(differences) < 1e-3

        times: dict[str, list[float]] = {name: [] for name in models}
        parts: dict[str, list[list[float]]] = {name: [] for name in models}
        for model in models.values():
            watched(model)
        for _ in range(ROUNDS):
            for name, model in models.items():
                start = perf_counter()
                for _ in range(3):
                    step(model, optimizers[name], *data[0])
                times[name].append((perf_counter() - start) / 3 * 1e3)
                parts[name].append(shares(model, optimizers[name], *data[0]))
        print("           step ms   batch norm ms   + addition and activation ms")
        rows = {name: [median(times[name]), *map(median, zip(*parts[name]))] for name in models}
        for name, row in rows.items():
            ratios = [f"{value:8.2f} {rows['torch'][i] / value:5.2f}x" for i, value in enumerate(row)]
            print(f"{name:8s} {'  '.join(ratios)}")


if __name__ == "__main__":
    main()
