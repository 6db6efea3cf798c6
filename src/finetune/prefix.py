"""A network in two after its first layers: while those are frozen, only the rest is computed."""

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from finetune.layering import layer_at, layer_modules

Part = Callable[[Tensor], Tensor]
Layers = Sequence[Mapping[str, nn.Module]]


class Unsplittable(Exception):
    """Why a network cannot be taken apart after a layer."""


@dataclass(frozen=True)
class Split:
    """net(images) is rest(head(images)): both call the modules of net itself, and hold no copy.

    num_values: of each image, in between.
    """

    head: Part
    rest: Part
    num_values: int


class LayerTracer(fx.Tracer):
    """Looks into what holds layers, and never into a layer: that behaves as its own mode says."""

    proxy_buffer_attributes = True

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = [name for modules in layers for name in modules]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it holds no layer."""
        inside = f"{module_qualified_name}."
        return not any(layer.startswith(inside) for layer in self.layers)

    def create_arg(self, a: Any) -> Any:
        """Refuse a tensor that is made once and for all while the forward is looked at."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Unsplittable("its forward makes tensors outside of its layers")
        return super().create_arg(a)


def split(net: nn.Module, layers: int, size: int) -> Split:
    """Take a headless net apart after so many of its layers, at least 1 and not all.

    It is tried on two images of size x size. Raises Unsplittable.
    """
    whole = nn.Sequential(net)  # called with the images alone, arguments with defaults have these
    named = [
        {f"0.{name}": module for name, module in modules.items()} for modules in layer_modules(net)
    ]
    with modes_kept(whole):
        graph = traced(whole, named)
        frozen = frozen_nodes(graph, named, layers)
        head, rest = (part(whole, g) for g in taken_apart(graph, frozen))
        return Split(head, rest, tried(whole.eval(), head, rest, size))


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def traced(net: nn.Module, layers: Layers) -> fx.Graph:
    """The forward of a net, its layers as nodes. Raises Unsplittable."""
    before, graphs = random_states(), []
    net = copy.deepcopy(net)  # a forward may keep what is no tensor yet
    try:
        for training in (True, False):
            net.train(training)
            graphs.append(LayerTracer(layers).trace(net))
    except Unsplittable:
        raise
    except Exception as error:  # whatever a forward does with values that are not there yet
        reason = str(error).strip().partition("\n")[0]
        raise Unsplittable(f"its forward cannot be followed: {reason}") from error
    if random_states() != before:
        raise Unsplittable("its forward draws random numbers outside of its layers")
    if str(graphs[0]) != str(graphs[1]):
        raise Unsplittable("its forward is another in training, outside of its layers")
    return graphs[0]


def random_states() -> bytes:
    """Of what a forward may draw from while it is followed."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
    return pickle.dumps(states)


def frozen_nodes(graph: fx.Graph, layers: Layers, num_frozen: int) -> set[fx.Node]:
    """What depends on the images and the first layers alone."""
    frozen: set[fx.Node] = set()
    for node in graph.nodes:
        of_module = node.op in ("call_module", "get_attr")
        own = layer_at(layers, str(node.target)) if of_module else 0
        if node.op != "output" and own < num_frozen and frozen.issuperset(node.all_input_nodes):
            frozen.add(node)
    return frozen


def taken_apart(graph: fx.Graph, frozen: set[fx.Node]) -> tuple[fx.Graph, fx.Graph]:
    """The frozen nodes, and the others as a function of what the former give them."""
    taken_on = [
        node
        for node in graph.nodes
        if node in frozen and node.op != "get_attr" and not frozen.issuperset(node.users)
    ]
    if len(taken_on) != 1 or taken_on[0].op == "placeholder":
        names = ", ".join(node.name for node in taken_on) or "nothing"
        raise Unsplittable(f"its later layers take more than what the layer before gives: {names}")
    head, rest = fx.Graph(), fx.Graph()
    in_head: dict[fx.Node, fx.Node] = {}
    in_rest = {taken_on[0]: rest.placeholder("values")}
    for node in graph.nodes:
        if node in frozen:
            in_head[node] = head.node_copy(node, in_head.__getitem__)
        if node not in frozen or node.op == "get_attr":  # a parameter is looked up in both
            in_rest[node] = rest.node_copy(node, in_rest.__getitem__)
    head.output(in_head[taken_on[0]])
    return head, rest


def part(net: nn.Module, graph: fx.Graph) -> Part:
    """A graph as a function that looks up the modules of net when it calls them.

    fx.GraphModule would hold parameters of its own names, and fx.Interpreter takes a millisecond.
    """
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return partial(names["forward"], net)


def tried(net: nn.Module, head: Part, rest: Part, size: int) -> int:
    """Number of values of an image between two parts; Unsplittable if these are not the net."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(net.parameters()))
    with torch.no_grad():
        values = head(images.clone())
        if not isinstance(values, Tensor) or values.shape[:1] != (2,):
            raise Unsplittable("what its later layers take is not one tensor for each image")
        num_values = values[0].numel()
        if not torch.equal(rest(values), net(images)):
            raise Unsplittable("its two parts give something else than the whole")
    return num_values
