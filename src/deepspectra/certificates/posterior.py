"""The posterior's coordinates: eigenvectors of the Kronecker factors of the curvature, and its diagonal there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspectra.certificates.networks import Examples, GaussianNetwork
from deepspectra.certificates.stochastic_layers import GaussianLinear
from deepspectra.errors import CertificateError
from deepspectra.kfac.exact_blocks import ParameterBlock, places
from deepspectra.kfac.kronecker import all_from
from deepspectra.kfac.moments import Squares, add_squares
from deepspectra.kfac.operators import Kronecker, KroneckerSum
from deepspectra.problem.problem import Problem
from deepspectra.rows.captures import captures_of, layer_of

BASES = ("ekfac", "kfac", "standard", "closed_form")
SIDES = ("inputs", "both")
BATCH = 500


class Coordinates(NamedTuple):
    """Of one layer: eigenvectors by descending eigenvalue, and the diagonal of the curvature between them."""

    left: Tensor | None  # U_S (o, o); None is the identity
    right: Tensor | None  # U_A (d, d)
    curvature: Tensor  # (o, d) float64, uᵀ G v of the mean loss


def coordinates(problem: Problem, network: GaussianNetwork, basis: str, sides: str) -> dict[str, Coordinates]:
    """Layer → coordinates, from the library's Kronecker factors S ⊗ A of the problem.

    With "ekfac", and in the "standard" basis, the diagonal is that of G itself; with "kfac" that of S ⊗ A. With
    "closed_form" S is 4^(p−L) WᵀE[diag p − p pᵀ]W, W the product of the weights above layer p of L. With sides
    "inputs" U_S is the identity, and always that of the last layer, for its rows are the classes.

    Raises:
        CertificateError: "closed_form" of a network with convolutions.

    Cost: as `kronecker`, and once more over the captured features and errors for the diagonal.

    Source: Wu et al. 2020, arXiv 2010.04261, section 6 and appendix on the closed form of the output Hessian.
    """
    captures = captures_of(problem)
    captures.hold()
    factors = all_from(captures, ("kfac",))["kfac"]
    found, squares = {}, {}
    blocks = _blocks(factors, network)
    outputs = _closed_form_outputs(network, blocks) if basis == "closed_form" else {}
    for layer, (place, block) in blocks.items():
        S, A = block.left[0, 0].double(), block.right[0, 0].double()
        S = outputs.get(layer, S)
        values_a, V = _descending(A)
        _, U = _descending(S)
        turned = basis != "standard"
        if not turned:
            values_a, V = A.diagonal(), torch.eye(len(A), dtype=A.dtype, device=A.device)
        left = _outputs(U, len(S), turned, sides, is_last=layer == network.output)
        U = torch.eye(len(S), dtype=S.dtype, device=S.device) if left is None else left
        values_s = (U.T @ S @ U).diagonal()
        product = values_s.clamp_min(0)[:, None] * values_a.clamp_min(0)
        found[layer] = Coordinates(left, V if turned else None, product)
        if basis in ("ekfac", "standard"):
            dtype = block.dtype
            squares[layer] = Squares(place, U[None].to(dtype), V[None].to(dtype))
    add_squares(captures.batches() if squares else (), squares.values())
    captures.release()
    for layer, total in squares.items():
        found[layer] = found[layer]._replace(curvature=total.sums.total[0])
    return {name: _whole(found[name], network, name) for name in network.layers if name in found}


def _blocks(factors: Kronecker, network: GaussianNetwork) -> dict[str, tuple[ParameterBlock, KroneckerSum]]:
    """Gaussian layer → its block of a Kronecker-factored operator."""
    return {
        layer: (place, block)
        for name, place in factors.places.items()
        if (layer := layer_of(place.weight.name)) in network.layers
        and isinstance(block := factors.blocks[name], KroneckerSum)
    }


def _closed_form_outputs(
    network: GaussianNetwork, blocks: dict[str, tuple[ParameterBlock, KroneckerSum]]
) -> dict[str, Tensor]:
    """Layer → S of a ReLU network whose units are open half of the time, whatever the others do."""
    if any(not isinstance(layer, GaussianLinear) for layer in network.layers.values()):
        raise CertificateError("the closed form of the output Hessian is one of fully connected layers; use 'kfac'.")
    _, top = blocks[network.output]
    S = top.left[0, 0].double()
    found: dict[str, Tensor] = {}
    for name, layer in reversed(network.layers.items()):
        found[name] = S
        weights = layer.posterior_mean().double()
        weights = weights[:, :-1] if layer.has_bias else weights
        S = weights.T @ S @ weights / 4
    return found


def curvature_in(problem: Problem, network: GaussianNetwork) -> dict[str, Tensor]:
    """Layer → diagonal (o, k) of G in the posterior's own coordinates, exact, and its trace beyond those kept."""
    batches = captures_of(problem).batches()
    first = next(batches)
    sizes = {name: value.numel() for name, value in problem.parameters.items()}
    squares: dict[str, Squares] = {}
    for place in places(first.uses, sizes):
        layer = network.layers.get(layer_of(place.weight.name))
        if layer is not None and place.is_matrix and place.shape[2] == layer.prior_mean.shape[1]:
            left, right = layer.whole_left().float(), layer.whole_right().float()
            squares[layer_of(place.weight.name)] = Squares(place, left[None], right[None])
    add_squares(itertools.chain([first], batches), squares.values())
    return {name: total.sums.total[0] for name, total in squares.items()}


def closed_form(network: GaussianNetwork, found: dict[str, Coordinates], strength: float) -> None:
    """Variances that are best where the loss is its quadratic model: 1/s = 1/λ + β h, and no larger than they are."""
    with torch.no_grad():
        for name, layer in network.layers.items():
            if name in found:
                h = found[name].curvature[:, : layer.mean.shape[1]]
                ratio = 1 / (1 + layer.scale * strength * h)
                layer.log_ratio.copy_(ratio.log().to(layer.log_ratio))


def squared_weights(network: GaussianNetwork) -> None:
    """Variances that are the squares of the means of the weights, in the coordinates that they have."""
    with torch.no_grad():
        for layer in network.layers.values():
            weights = layer.posterior_mean()
            weights = weights if layer.left is None else layer.left.T @ weights
            weights = weights if layer.right is None else weights @ layer.right
            layer.log_ratio.copy_((weights.square() / layer.scale).clamp(1e-8, 1.0).log())


def take(network: GaussianNetwork, found: dict[str, Coordinates], num_kept: int | None) -> None:
    """Turn every layer to its coordinates; of the first, if its inputs stay the same, keep so many directions."""
    for name, layer in network.layers.items():
        if name not in found:
            continue
        kept = num_kept if name == network.first and found[name].right is not None else None
        layer.turn(found[name].left, found[name].right, kept)


def drawn_problem(network: GaussianNetwork, like: nn.Module, examples: Examples, problem: Problem) -> Problem:
    """The network at the posterior's mean, with the noise that its hidden layers drew for each example held fixed.

    Its Kronecker factors are those of the network that is certified: features are those of draws, not of the mean.
    """
    plain = network.mean_model(like)
    hidden = [name for name in network.layers if name != network.output]
    batches = [(x, y, *noise) for x, y, noise in _with_noise(network, examples, hidden)]

    def shifted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with ExitStack() as stack:
            for name, noise in zip(hidden, batch[2:], strict=True):
                hook = model.get_submodule(name).register_forward_hook(lambda _, __, out, noise=noise: out + noise)
                stack.callback(hook.remove)
            return model(batch[0]), batch[1]

    return Problem(plain, batches, forward=shifted, memory=problem.memory)


@torch.no_grad()
def _with_noise(
    network: GaussianNetwork, examples: Examples, hidden: list[str]
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Batches of inputs and labels, with what noise added to each hidden layer's outputs."""
    for x, y in zip(torch.split(examples.inputs, BATCH), torch.split(examples.labels, BATCH), strict=True):
        noise: dict[str, Tensor] = {}

        with ExitStack() as stack:
            for name in hidden:
                hook = network.layers[name].register_forward_hook(
                    lambda layer, x, z, name=name, found=noise: found.update({name: z - layer.quiet(x[0])})
                )
                stack.callback(hook.remove)
            network.outputs(network.prepared(x))
        yield x, y, [noise[name] for name in hidden]


def _outputs(U: Tensor, size: int, turned: bool, sides: str, *, is_last: bool) -> Tensor | None:
    """U_S of a layer; of the last, rows are classes, but for two their sum and difference: the latter matters."""
    if not turned or (is_last and size != 2) or (not is_last and sides == "inputs"):
        return None
    return U.new_tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5 if is_last else U


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _whole(found: Coordinates, network: GaussianNetwork, name: str) -> Coordinates:
    """With a direction for the bias, where the factors do not have it among the inputs."""
    d = network.layers[name].prior_mean.shape[1]
    if found.curvature.shape[1] == d:
        return found
    right = found.right
    if right is not None:
        right = torch.nn.functional.pad(right, (0, 1, 0, 1))
        right[-1, -1] = 1
    return Coordinates(found.left, right, torch.nn.functional.pad(found.curvature, (0, 1)))
