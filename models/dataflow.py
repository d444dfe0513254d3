"""Which layer of a network takes the output of which, by traces of its forward pass (torch.fx)."""

from __future__ import annotations

import copy
import dis
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FrameType

import torch
from torch import fx, nn
from torch.nn import functional as F

from models.hooks import before_forward

_FUNCTIONAL_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Shapes = dict[str, set[tuple[int, ...]]]
SOMEWHERE = "(elsewhere)"  # a consumer that is no call of a layer with this value as its one input


class DataFlow:
    """The calls of a network's layers in training and in evaluation.

    A module whose forward pass cannot be traced, such as one that branches on values, is taken as a whole, and its
    children are traced each on its own: they are taken to be called as modules, not layer by layer from outside.
    Layers are named as `Module.named_modules` names them first.

    Parameters
    ----------
    network : Module
        It stays as it is, its hooks are not called, and torch's generator of random numbers stays where it is.
    layers : tuple of types
        Modules of these types are taken as a whole, beside the layers of torch.nn.

    Attributes
    ----------
    untraced : dict of str to str
        The names of modules whose forward pass is not known, with the reason for each.
    functional : tuple of str
        The calls of batch norm as a function, each named by the module that makes it: ``"block.batch_norm"``. Of a
        module without a trace, whose code mentions such a function, one.
    """

    def __init__(self, network: nn.Module, layers: tuple[type[nn.Module], ...]):
        self.untraced: dict[str, str] = {}
        self.functional: tuple[str, ...] = ()
        self._layers = layers
        names = {module: name for name, module in network.named_modules()}
        self._first = {alias: names[module] for alias, module in network.named_modules(remove_duplicate=False)}
        self._sources: dict[str, set[str]] = defaultdict(set)
        self._consumers: dict[str, set[str]] = defaultdict(set)
        self._described: dict[str, str] = {}
        self._attributes: set[str] = set()
        if isinstance(network, layers):
            self.untraced[""] = "it is a single layer"
            return
        with torch.random.fork_rng(devices=[]):
            for training in (True, False):
                twin = _twin(network, training)
                self._trace(twin, dict(twin.named_modules()), "")

    def uses_parameters_of(self, name: str) -> bool:
        """Whether something other than the layer itself computes, or may compute, with its parameters or buffers."""
        if any(attribute.rpartition(".")[0] == name for attribute in self._attributes):
            return True
        return any(_batch_norm_of(owner) in self.functional for owner in self._owners(name) & self.untraced.keys())

    def sources(self, name: str) -> set[str]:
        """Return the layers whose outputs the calls of a layer take.

        Raises
        ------
        LookupError
            They are not known, or not all of them are layers; the message says why.
        """
        part = self._untraced_part(name)
        if part is not None:
            raise LookupError(f"the calls within {part or 'the network'} are not known: {self.untraced[part]}")
        if not self._sources[name]:
            raise LookupError("it is not called")
        for source in self._sources[name]:
            if source in self._described:
                raise LookupError(f"it follows {self._described[source]}")
        return self._sources[name]

    def consumers(self, name: str) -> set[str]:
        """Return the layers that take the outputs of a layer as their one input, and `SOMEWHERE` for all else."""
        return {SOMEWHERE} if self._untraced_part(name) is not None else self._consumers[name]

    def _untraced_part(self, name: str) -> str | None:
        """Return the module without a trace from whose code this layer may be called, if there is one."""
        return min(self._owners(name) & self.untraced.keys(), default=None)

    def _owners(self, name: str) -> set[str]:
        return {self._first[alias.rpartition(".")[0]] for alias, first in self._first.items() if first == name}

    def _trace(self, module: nn.Module, modules: dict[str, nn.Module], name: str) -> None:
        """Trace a module and, where it or one within it cannot be traced, the children of that."""
        tracer = _Tracer(self._layers)
        try:
            graph = tracer.trace(module, _defaults(module))
        except Exception as error:  # noqa: BLE001 whatever a network raises on symbolic values
            self._trace_children(modules, name, _reason(error))
            return
        prefix = f"{name}." if name else ""
        self._read(graph, tracer, prefix)
        for inner, reason in tracer.unopened.items():
            self._trace_children(modules, self._first[prefix + inner], reason)

    def _trace_children(self, modules: dict[str, nn.Module], name: str, reason: str) -> None:
        self.untraced[name] = reason
        if _mentions_batch_norm(inspect.unwrap(type(modules[name]).forward).__code__):
            self.functional = tuple(dict.fromkeys([*self.functional, _batch_norm_of(name)]))
        for child, module in modules[name].named_children():
            path = f"{name}.{child}" if name else child
            if not isinstance(module, self._layers) and any(True for _ in module.children()):
                self._trace(module, modules, self._first[path])

    def _read(self, graph: fx.Graph, tracer: _Tracer, prefix: str) -> None:
        """Take up what one graph shows: who follows whom, parameters that are used directly, functional norms."""
        number: dict[str, int] = defaultdict(int)
        functional = list(self.functional)
        for node in graph.nodes:
            if node.op == "get_attr":
                self._attributes.add(self._layer_of_attribute(prefix + str(node.target)))
            elif node in tracer.abandoned:
                continue
            elif node.op == "call_module":
                self._read_call(node, tracer, prefix)
            elif node.target in _FUNCTIONAL_BATCH_NORMS:
                path = prefix + _batch_norm_of(_caller(node))
                number[path] += 1
                functional.append(path if number[path] == 1 else f"{path}_{number[path] - 1}")
        self.functional = tuple(dict.fromkeys(functional))

    def _read_call(self, node: fx.Node, tracer: _Tracer, prefix: str) -> None:
        name = self._first[prefix + str(node.target)]
        for user in node.users.keys() - tracer.abandoned:
            is_input = user.op == "call_module" and user.all_input_nodes == [node]
            self._consumers[name].add(self._first[prefix + str(user.target)] if is_input else SOMEWHERE)
        if not node.all_input_nodes:
            return
        source = node.all_input_nodes[0]
        if source.op == "call_module":
            self._sources[name].add(self._first[prefix + str(source.target)])
        else:
            key = f"{prefix}({source.name})"  # no name of a module
            self._described[key] = describe(source)
            self._sources[name].add(key)

    def _layer_of_attribute(self, path: str) -> str:
        module, _, attribute = path.rpartition(".")
        return f"{self._first[module]}.{attribute}"


def describe(node: fx.Node) -> str:
    """Return what a node of a graph that is no call of a module computes, for people: "a sum", "a call of relu"."""
    if node.op == "placeholder":
        return "an input"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "a sum" if name in ("add", "iadd") else f"a call of {name}"


class _Tracer(fx.Tracer):
    """Traces into all modules but single layers and those that cannot be traced.

    Attributes
    ----------
    unopened : dict of str to str
        The modules with layers of their own that the trace shows as one node, with the reason.
    abandoned : set of Node
        The nodes of modules that turned out to be untraceable.
    """

    def __init__(self, layers: tuple[type[nn.Module], ...]):
        super().__init__()
        self._layers = layers
        self.unopened: dict[str, str] = {}
        self.abandoned: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._layers):
            return True
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        if is_leaf and any(True for _ in m.children()):
            self.unopened[module_qualified_name] = f"{type(m).__name__} is torch's own, and is not traced into"
        return is_leaf

    def to_bool(self, obj: fx.Proxy) -> bool:
        # An assertion about a shape is no branch. Frames: this one, the proxy's __bool__, and the one that asks.
        return _is_assertion(sys._getframe(2)) or super().to_bool(obj)

    def call_module(self, m, forward, args, kwargs):
        name = self.path_of_module(m)
        nodes, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever the network raises
            if self.is_leaf_module(m, name):
                raise
            self.module_stack = stack
            self.abandoned.update(list(self.graph.nodes)[nodes:])
            self.unopened[name] = _reason(error)
            return self.create_proxy("call_module", name, args, kwargs)


def _is_assertion(frame: FrameType) -> bool:
    """Whether a frame is at the condition of ``assert condition``. torch's own `trace_asserts` does not know the
    instructions of Python 3.11."""
    after = [step for step in dis.get_instructions(frame.f_code) if step.offset >= frame.f_lasti][1:3]
    return any(step.opname == "LOAD_ASSERTION_ERROR" or step.argval is AssertionError for step in after)


def _twin(network: nn.Module, training: bool) -> nn.Module:
    """Return a copy without hooks, to be traced: its forward pass may change its buffers and attributes. Parameters are
    those of the network itself, in order not to need their memory twice."""
    twin = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    for module in twin.modules():
        module.training = training
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
    return twin


def _defaults(module: nn.Module) -> dict[str, object] | None:
    """Return the arguments of a forward pass that have defaults: calls are taken to leave them alone."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} or None


def _caller(node: fx.Node) -> str:
    """Return the name of the module in whose forward pass a node was made; "" for the traced one."""
    names = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return names[-1] if names else ""


def _batch_norm_of(module: str) -> str:
    return f"{module}.batch_norm" if module else "batch_norm"


def _mentions_batch_norm(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any("batch_norm" in name for name in code.co_names) or any(_mentions_batch_norm(part) for part in inner)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def layers_with(network: nn.Module, parameter: torch.Tensor) -> Iterator[nn.Module]:
    """Yield the modules that hold this parameter themselves."""
    for module in network.modules():
        if any(own is parameter for own in module._parameters.values()):
            yield module


def input_shapes(network: nn.Module, layers: tuple[type[nn.Module], ...], inputs: torch.Tensor) -> Shapes:
    """Return the shapes of what reaches each layer of these types in evaluation, by name.

    Raises
    ------
    ValueError
        The network does not take these inputs.
    """
    twin = _twin(network, training=False)
    shapes: Shapes = defaultdict(set)

    def note(name: str):
        return lambda _, x: shapes[name].add(tuple(x.shape))

    for name, module in twin.named_modules():
        if isinstance(module, layers):
            before_forward(module, note(name))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            twin(inputs)
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
            raise ValueError(f"the network does not take inputs of shape {tuple(inputs.shape)}: {error}") from error
    return shapes
