"""`fuse`: batch norm, the addition after it and the activation after that, found in a graph and made one module."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from types import FunctionType
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
# Not those in place: their result has the dtype of the batch norm, whatever the other term's is.
_ADDITIONS: Final = (operator.add, torch.add)
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
# What gives a tensor in memory of its own, where it is not asked to work in place.
_MAKERS: Final = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, *_BY_MODULE)
_WRITERS: Final = tuple(getattr(operator, name) for name in fx.graph.inplace_methods)


def fuse(model: nn.Module) -> fx.GraphModule:
    """Return a model in which batch norm, an addition and an activation are one pass over memory.

    The model is traced by torch.fx. Where a batch norm is followed by relu, relu6, silu, leaky_relu or gelu with the
    tanh approximation, or by an addition and then one of these, and nobody else reads what is between them, they become
    one `BatchNormAct1d`, `BatchNormAct2d` or `BatchNormAct3d`. All other batch norms become those of
    `fastbn.torch`. It trains, and infers, and gives the same results within float error.

    Where that could change results nothing is fused: where the batch norm or the activation has hooks, where the model
    also reads parameters or statistics itself, and where it writes in place what a batch norm that is called later, at
    the addition, or its gradient needs.

    Parameters
    ----------
    model : torch.nn.Module
        torch.fx must be able to trace it. It stays as it is; parameters and buffers are shared with it.

    Returns
    -------
    torch.fx.GraphModule
        Its state dictionary has all keys of the model's, also of what the model does not use, and those of constants
        that torch.fx makes buffers.

    Raises
    ------
    TypeError
        If model is none.
    torch.fx.proxy.TraceError
        If its control flow depends on data. Also if it is itself a batch norm, which is nothing to fuse.

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
    tracer = _Tracer()
    graph = tracer.trace(model)
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    found = dict(traced.named_modules(remove_duplicate=False))
    memory = _Memory(traced.graph, found)
    read = _storages(_read(traced))
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and type(found[node.target]) in _FUSED:
            calls.setdefault(found[node.target], []).append(node)
    for module, nodes in calls.items():
        fits = _is_plain(module) and read.isdisjoint(_storages(_tensors(module)))
        chains = [_chain(node, found, memory) if fits else None for node in nodes]
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
                memory.replace(chain.last, _contract(traced.graph, node, chain))
    traced.delete_all_unused_submodules()
    _keep_unused(model, traced)
    traced.graph.lint()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    """Takes fastbn's batch norms as one call each, as it does PyTorch's: their hooks are not recorded besides."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, modules._Fast) or super().is_leaf_module(m, module_qualified_name)


def _keep_unused(model: nn.Module, traced: fx.GraphModule) -> None:
    """Register the tensors of a model's state dictionary that its graph does not use."""
    there = traced.state_dict()
    for key, value in model.state_dict(keep_vars=True).items():
        first = key.partition(".")[0]
        taken = hasattr(traced, first) and first not in traced._modules  # graph, code, ...: a GraphModule has its own
        if key in there or taken or not isinstance(value, torch.Tensor):
            continue
        path, _, name = key.rpartition(".")
        try:
            owner = traced.get_submodule(path)
        except AttributeError:
            owner = nn.Module()
            traced.add_submodule(path, owner)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a module does what its class does, and the class is PyTorch's or fastbn's."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    known = type(module).__module__.startswith(("torch.nn.", "fastbn.torch."))
    return known and not any(hooks) and "forward" not in vars(module)


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return numbers for the memory of tensors: equal where it is the same."""
    return {
        t.untyped_storage()._cdata if t.layout is torch.strided else id(t)
        for t in tensors
        if not nn.parameter.is_lazy(t)
    }


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _read(traced: fx.GraphModule) -> list[torch.Tensor]:
    """Return parameters and buffers that a graph reads by itself."""
    values = [operator.attrgetter(n.target)(traced) for n in traced.graph.nodes if n.op == "get_attr"]
    return [value for value in values if isinstance(value, torch.Tensor)]


class _Memory:
    """Which values of a graph may lie in the same memory, and which of them a node may write.

    What is not known for sure counts as shared and as written.
    """

    def __init__(self, graph: fx.Graph, found: dict[str, nn.Module]) -> None:
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self._groups: dict[fx.Node, set[fx.Node]] = {}
        tensors: set[fx.Node] = set()  # values that are tensors for sure
        given: list[fx.Node] = []
        for node in graph.nodes:
            self._groups[node] = {node}
            if node.op in ("placeholder", "get_attr"):
                # A caller may give one tensor twice.
                given.append(node)
                self._join(node, given[:1])
            elif node.op != "output":
                written = self.written[node] = _written(node, found)
                if not written and _makes(node, found, tensors):
                    tensors.add(node)
                    continue
                self._join(node, written or node.all_input_nodes)
                if written and tensors.issuperset(written):
                    tensors.add(node)

    def _join(self, node: fx.Node, others: list[fx.Node]) -> None:
        group = self._groups[node]
        for other in others:
            if self._groups[other] is not group:
                group |= self._groups[other]
        for member in group:
            self._groups[member] = group

    def shared(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two values may lie in the same memory."""
        return self._groups[first] is self._groups[second]

    def writes(self, node: fx.Node, *values: fx.Node) -> bool:
        """Whether a node may write one of some values."""
        return any(self.shared(target, value) for target in self.written.get(node, ()) for value in values)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let a node that writes nothing stand for another one."""
        self._groups[new] = self._groups[old]


def _written(node: fx.Node, found: dict[str, nn.Module]) -> list[fx.Node]:
    """Return the arguments that a node may write: none, the first, or all where that is not known."""
    inputs = node.all_input_nodes
    name = str(node.target)
    if node.op == "call_module":
        known = _is_plain(found[name])
        in_place = bool(getattr(found[name], "inplace", False))
    elif node.op == "call_method":
        known = hasattr(torch.Tensor, name) and not name.startswith("__") and name != "set_"
        in_place = name.endswith("_")
    else:
        name = str(getattr(node.target, "__name__", ""))
        known = node.target is getattr or any(getattr(m, name, None) is node.target for m in (torch, F, operator))
        known = known and node.target not in _WRITERS
        in_place = (name.endswith("_") and not hasattr(operator, name)) or _asked_in_place(node)
    if not known or "out" in node.kwargs:
        return inputs
    if not in_place:
        return []
    return inputs[:1] if node.args and node.args[0] is inputs[0] else inputs


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function's argument `inplace` is anything but False."""
    if not isinstance(node.target, FunctionType):
        return False
    parameters = list(inspect.signature(node.target).parameters)
    given = {**dict(zip(parameters, node.args)), **node.kwargs}
    return given.get("inplace", False) is not False


def _makes(node: fx.Node, found: dict[str, nn.Module], tensors: set[fx.Node]) -> bool:
    """Whether the value of a node that writes nothing is a tensor in memory of its own."""
    if node.op == "call_module":
        return isinstance(found[str(node.target)], _MAKERS)
    if node.target is torch.cat or node.target in _BY_FUNCTION:
        return True
    # Lists can be added, too.
    return node.target in ("add", *_ADDITIONS) and not tensors.isdisjoint(node.all_input_nodes)


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
    last: fx.Node
    activation: bridge.Activation


def _chain(node: fx.Node, found: dict[str, nn.Module], memory: _Memory) -> _Chain | None:
    """Return what follows a batch norm, or None where that does not fit or belongs to another one."""
    follower = _only_user(node)
    addition = None
    if follower is not None and _is_addition(follower):
        addition = follower
        follower = _only_user(addition)
    if follower is None:
        return None
    activation = _activation(follower, found)
    if activation is None:
        return None
    chain = _Chain(addition, follower, activation)
    return chain if _can_move(node, chain, found, memory) and _lasts(node, chain, memory) else None


def _can_move(node: fx.Node, chain: _Chain, found: dict[str, nn.Module], memory: _Memory) -> bool:
    """Whether a batch norm may be called at the addition after it: it sees the same input and statistics there."""
    if chain.addition is None:
        return True
    statistics = _storages(found[str(node.target)].buffers())
    for other in _nodes(node.next, chain.addition):
        if memory.writes(other, *node.all_input_nodes):
            return False
        if other.op == "call_module" and not statistics.isdisjoint(_storages(_tensors(found[str(other.target)]))):
            return False
    return True


def _other_term(addition: fx.Node, term: fx.Node) -> fx.Node:
    return next(other for other in addition.all_input_nodes if other is not term)


def _lasts(node: fx.Node, chain: _Chain, memory: _Memory) -> bool:
    """Whether nobody writes the other term or the result later: the gradient may be found from them."""
    if chain.addition is None:
        return True
    added = _other_term(chain.addition, node)
    for other in _nodes(chain.addition.next, None):
        if other is not chain.last and memory.writes(other, added, chain.last):
            return False
    return True


def _nodes(first: fx.Node, end: fx.Node | None) -> Iterator[fx.Node]:
    """Go through nodes in order, up to an end or to the graph's."""
    while first is not end and first.op != "root":
        yield first
        first = first.next


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node) -> bool:
    """Whether a node adds two values and leaves both as they are."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    if node.args[0] is node.args[1]:
        return False
    return node.target == "add" if node.op == "call_method" else node.target in _ADDITIONS


def _activation(node: fx.Node, found: dict[str, nn.Module]) -> bridge.Activation:
    """Return the activation that a node applies to its first argument, if fastbn has it."""
    options: dict[str, Any]
    if node.op == "call_module":
        module = found[str(node.target)]
        name = _BY_MODULE.get(type(module), "") if _is_plain(module) else ""
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


def _contract(graph: fx.Graph, node: fx.Node, chain: _Chain) -> fx.Node:
    """Let one call of the batch norm, which is returned, take the place of its node and those after it."""
    place = node if chain.addition is None else chain.addition
    # Of the addition as it is now: what it adds may be fused already.
    residual = {} if chain.addition is None else {"residual": _other_term(chain.addition, node)}
    with graph.inserting_before(place):
        fused = graph.call_module(str(node.target), node.args, {**node.kwargs, **residual})
    chain.last.replace_all_uses_with(fused)
    for gone in (chain.last, chain.addition, node):
        if gone is not None:
            graph.erase_node(gone)
    return fused
