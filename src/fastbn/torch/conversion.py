"""`convert` and `revert`: a module becomes another by change of its class.

Nothing is copied or replaced: the module stays the object that it was, with its parameters, buffers, hooks, training
flag, and everybody who refers to it, an optimizer or a second place in the model.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from torch import nn

from ..errors import must
from . import modules
from .synchronized import SyncBatchNorm

Module = TypeVar("Module", bound=nn.Module)

_FAST: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_PLAIN: Final = {fast: plain for plain, fast in _FAST.items()}


def convert(model: Module) -> Module:
    """Let fastbn compute every batch norm of a model, in place.

    Every module that is exactly a `torch.nn.BatchNorm1d`, `BatchNorm2d` or `BatchNorm3d` becomes the one of
    the same name of `fastbn.torch`, and stays the same object: parameters, buffers, hooks and training flag are as
    they were. Subclasses, lazy modules that have not seen data, and scripted modules stay PyTorch's.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be a batch norm. Convert it before torch.compile.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        If model is none.

    See Also
    --------
    revert : undo it.
    fuse : let fastbn compute the relu after it as well.

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    >>> type(fastbn.torch.convert(model)[1])
    <class 'fastbn.torch.modules.BatchNorm1d'>
    """
    for module in _checked(model).modules():
        fast = _FAST.get(type(module))
        if fast is not None:
            _become(module, fast)
    return model


def revert(model: Module) -> Module:
    """Give every batch norm of a model back to PyTorch, in place: what `convert` and `convert_sync_batchnorm` did.

    Modules with an activation of their own (`BatchNormAct2d`, ...) have no counterpart and stay.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be a batch norm.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        If model is none.
    """
    for module in _checked(model).modules():
        plain = _PLAIN.get(type(module))
        if type(module) is SyncBatchNorm and module.converted_from is not None:
            plain = getattr(nn, module.converted_from)
            del module.converted_from, module.process_group
        if plain is not None:
            _become(module, plain)
    return model


def convert_sync_batchnorm(model: Module, process_group: Any = None) -> Module:
    """Let every batch norm of a model take its statistics from all processes of a group, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Its modules that are exactly a BatchNorm1d, 2d or 3d, of PyTorch or of fastbn, become `SyncBatchNorm`.
    process_group : torch.distributed.ProcessGroup, optional
        Of gloo; the default group if None.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        If model is none.
    """
    for module in _checked(model).modules():
        plain = _PLAIN.get(type(module), type(module))
        if plain in _FAST:
            _become(module, SyncBatchNorm)
            assert isinstance(module, SyncBatchNorm)
            module.converted_from, module.process_group = plain.__name__, process_group
    return model


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(must("model", "be a torch.nn.Module", type(model).__name__))
    return model
