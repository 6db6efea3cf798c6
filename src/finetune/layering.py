"""The layers of any network, stem first: what strategies freeze and scale."""

from collections.abc import Mapping, Sequence

from torch import nn


def layer_modules(net: nn.Module) -> list[dict[str, nn.Module]]:
    """Modules by name for each layer of a headless net: 0 is the stem; one per stage or block.

    One rule for CNNs and transformers. The children of net, in registration order, are the parts;
    while they make fewer than 4 layers, or one holds 90 % of the parameters, the largest is
    replaced by its own children. What has no weights (a norm, activation, pool) joins the part
    before it, and a lone convolution or linear layer (a downsampling) the stage after it.
    """
    return _joined(_parts(net))


def layer_of_parameter(net: nn.Module) -> dict[str, int]:
    """Layer of every parameter by name: 0 for one outside their modules, such as a class token."""
    layer_of = {
        f"{module_name}.{name}": layer
        for layer, modules in enumerate(layer_modules(net))
        for module_name, module in modules.items()
        for name, _ in module.named_parameters()
    }
    return {name: layer_of.get(name, 0) for name, _ in net.named_parameters()}


def layer_at(layers: Sequence[Mapping[str, nn.Module]], name: str) -> int:
    """Layer of a module, parameter or buffer by its name: 0 for one outside of their modules."""
    for layer, modules in enumerate(layers):
        if any(f"{name}.".startswith(f"{module}.") for module in modules):
            return layer
    return 0


def _joined(parts: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    layers: list[dict[str, nn.Module]] = [{}]
    for name, module in parts.items():
        if _num_weights(module) > 0 and _num_weights(*layers[-1].values()) > 0:
            layers.append({})
        layers[-1][name] = module
    for i in range(len(layers) - 2, 0, -1):  # from the end, so that a run of them joins as a whole
        here, after = layers[i], layers[i + 1]
        if _num_weights(*here.values()) == 1 < _num_weights(*after.values()):
            layers[i : i + 2] = [here | after]
    return layers


def _parts(net: nn.Module) -> dict[str, nn.Module]:
    parts = dict(net.named_children())
    while (name := _to_open(parts)) is not None:
        opened: dict[str, nn.Module] = {}
        for part, module in parts.items():
            if part == name:
                opened |= {f"{name}.{child}": inner for child, inner in module.named_children()}
            else:
                opened[part] = module
        parts = opened
    return parts


def _to_open(parts: dict[str, nn.Module]) -> str | None:
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    openable = [name for name, module in parts.items() if _num_weights(*module.children()) > 0]
    if not openable:
        return None
    largest = max(openable, key=sizes.__getitem__)
    few = len(_joined(parts)) < 4
    return largest if few or sizes[largest] > 0.9 * sum(sizes.values()) else None


def _num_weights(*modules: nn.Module) -> int:
    # matrices and kernels: the parameters of a norm are vectors
    return sum(parameter.ndim >= 2 for module in modules for parameter in module.parameters())
