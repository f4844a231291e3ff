"""`fuse`: batch norm, the addition after it and the activation after that, found in a graph and made one module."""

from __future__ import annotations

import operator
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..errors import must
from . import bridge, modules

_FUSED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: modules.BatchNormAct1d,
    nn.BatchNorm2d: modules.BatchNormAct2d,
    nn.BatchNorm3d: modules.BatchNormAct3d,
    modules.BatchNorm1d: modules.BatchNormAct1d,
    modules.BatchNorm2d: modules.BatchNormAct2d,
    modules.BatchNorm3d: modules.BatchNormAct3d,
}
_FAST: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    modules.BatchNorm1d: modules.BatchNorm1d,
    modules.BatchNorm2d: modules.BatchNorm2d,
    modules.BatchNorm3d: modules.BatchNorm3d,
}
_ADDITIONS: Final = (operator.add, operator.iadd, torch.add)
_BY_FUNCTION: Final[dict[Any, str]] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.leaky_relu: "leaky_relu",
    F.gelu: "gelu",
}
_BY_MODULE: Final[dict[type[nn.Module], str]] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
}


def fuse(model: nn.Module) -> fx.GraphModule:
    """Return a model in which batch norm, an addition and an activation are one pass over memory.

    The model is traced by torch.fx. Where a batch norm is followed by relu, relu6, silu, leaky_relu or gelu with the
    tanh approximation, or by an addition and then one of these, and nobody else reads what is between them, they become
    one `BatchNormAct1d`, `BatchNormAct2d` or `BatchNormAct3d`. All other batch norms become those of
    `fastbn.torch`. It trains, and infers, and gives the same results within float error.

    Parameters
    ----------
    model : torch.nn.Module
        torch.fx must be able to trace it. It stays as it is; parameters and buffers are shared with it.

    Returns
    -------
    torch.fx.GraphModule
        Its state dictionary has the keys of the model's.

    Raises
    ------
    TypeError
        If model is none.
    torch.fx.proxy.TraceError
        If its control flow depends on data.

    See Also
    --------
    convert : needs no tracing, and fuses nothing.

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    >>> [type(module).__name__ for module in fastbn.torch.fuse(model).children()]
    ['Linear', 'BatchNormAct1d']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(must("model", "be a torch.nn.Module", type(model).__name__))
    # torch.fx copies no module: those that change are replaced in the graph module by others of the same tensors.
    traced = fx.symbolic_trace(model)
    found = dict(traced.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and type(found[node.target]) in _FUSED:
            calls.setdefault(found[node.target], []).append(node)
    taken: set[fx.Node] = set()
    for module, nodes in calls.items():
        chains = [_chain(node, found, taken) for node in nodes]
        activations = {None if chain is None else chain.activation for chain in chains}
        # A module that is called more than once is fused only if what follows is the same everywhere.
        activation = activations.pop() if len(activations) == 1 else None
        replacement = _twin(module, activation)
        names = [name for name, other in found.items() if other is module]
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(found[parent], last, replacement)
            found[name] = replacement
        if activation is not None:
            for node, chain in zip(nodes, chains):
                assert chain is not None
                taken.update(_contract(traced.graph, node, chain))
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _twin(module: nn.Module, activation: bridge.Activation) -> nn.Module:
    """Return another module of the same parameters, buffers and hooks."""
    kind: Any = (_FAST if activation is None else _FUSED)[type(module)]
    twin = kind.__new__(kind)
    twin.__dict__.update(
        {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    )
    if activation is not None:
        twin.activation = activation  # type: ignore[assignment]
    return twin


class _Chain(NamedTuple):
    """What follows a batch norm."""

    addition: fx.Node | None
    added: fx.Node | None
    last: fx.Node
    activation: bridge.Activation


def _chain(node: fx.Node, found: dict[str, nn.Module], taken: set[fx.Node]) -> _Chain | None:
    """Return what follows a batch norm, or None where that does not fit or belongs to another one."""
    follower = _only_user(node)
    addition = added = None
    if follower is not None and _is_addition(follower, node):
        addition = follower
        added = next(other for other in follower.all_input_nodes if other is not node)
        if follower in taken or _read_between(node, follower):
            return None
        follower = _only_user(addition)
    if follower is None:
        return None
    activation = _activation(follower, found)
    return None if activation is None else _Chain(addition, added, follower, activation)


def _read_between(node: fx.Node, later: fx.Node) -> bool:
    """Whether a batch norm's input has another reader before a later node: it might write it, too."""
    others = {user for source in node.all_input_nodes for user in source.users} - {node}
    between = node.next
    while between is not later:
        if between in others:
            return True
        between = between.next
    return False


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node, term: fx.Node) -> bool:
    """Whether a node adds a term and another tensor, and leaves that as it is."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    first, second = node.args
    if first is second:
        return False
    if node.op == "call_method":
        return node.target == "add" or (node.target == "add_" and first is term)
    if node.op != "call_function" or node.target not in _ADDITIONS:
        return False
    return node.target is not operator.iadd or first is term


def _activation(node: fx.Node, found: dict[str, nn.Module]) -> bridge.Activation:
    """Return the activation that a node applies to its first argument, if fastbn has it."""
    options: dict[str, Any]
    if node.op == "call_module":
        module = found[str(node.target)]
        name = _BY_MODULE.get(type(module), "")
        options = {
            "negative_slope": getattr(module, "negative_slope", 0.01),
            "approximate": getattr(module, "approximate", ""),
        }
    elif node.op == "call_method":
        name, options = {"relu": "relu", "relu_": "relu"}.get(str(node.target), ""), {}
    elif node.op == "call_function":
        name, options = _BY_FUNCTION.get(node.target, ""), dict(node.kwargs)
        if len(node.args) > 1 and name == "leaky_relu":
            options["negative_slope"] = node.args[1]
    else:
        return None
    if name == "gelu":
        return "gelu_tanh" if options.get("approximate") == "tanh" else None
    if name == "leaky_relu":
        slope = options.get("negative_slope", 0.01)
        return ("leaky_relu", float(slope)) if isinstance(slope, int | float) else None
    return name or None


def _contract(graph: fx.Graph, node: fx.Node, chain: _Chain) -> list[fx.Node]:
    """Let the batch norm's node take the place of those after it, which are returned."""
    place = node if chain.addition is None else chain.addition
    arguments = node.args if chain.added is None else (*node.args, chain.added)
    with graph.inserting_before(place):
        fused = graph.call_module(str(node.target), arguments, node.kwargs)
    chain.last.replace_all_uses_with(fused)
    gone = [n for n in (chain.last, chain.addition, node) if n is not None]
    for n in gone:
        graph.erase_node(n)
    return gone
