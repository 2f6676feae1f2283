"""The posterior's coordinates are the library's Kronecker eigenvectors, and the curvature there is G's diagonal."""

import pytest
import torch
from torch import nn

import deepspectra as ds
from certificates_problems import cnn, data, images, mlp
from deepspectra.certificates.networks import GaussianNetwork, examples_of
from deepspectra.certificates.posterior import closed_form, coordinates, curvature_in, drawn_problem, take
from deepspectra.certificates.stochastic_layers import Draws
from deepspectra.errors import CertificateError


def _dense_blocks(problem, names):
    """Layer → its block of G, rows and columns in the order (output, input with the bias last)."""
    G = ds.GaussNewton(problem).dense().double()
    kfac = ds.kronecker(problem)
    return {name: G[kfac.index[name]][:, kfac.index[name]] for name in names}


@pytest.mark.parametrize("basis", ["ekfac", "kfac", "standard"])
@pytest.mark.parametrize("sides", ["inputs", "both"])
def test_coordinates_are_eigenvectors_of_the_factors_and_curvature_is_the_diagonal_there(basis, sides):
    problem = ds.Problem(mlp(classes=3), (data(60)[0], torch.arange(60) % 3), dtype=torch.float64)
    network = GaussianNetwork(problem.model, examples_of(problem).inputs[:3], 1.0)
    found = coordinates(problem, network, basis, sides)
    kfac = ds.kronecker(problem)
    for name, block in _dense_blocks(problem, found).items():
        S, A = kfac.blocks[name].left[0, 0].double(), kfac.blocks[name].right[0, 0].double()
        left = torch.eye(len(S)).double() if found[name].left is None else found[name].left
        right = torch.eye(len(A)).double() if found[name].right is None else found[name].right
        if basis != "standard":
            assert torch.allclose(right.T @ A @ right, (right.T @ A @ right).diagonal().diag(), atol=1e-10)
        if sides == "both" and name != network.output and basis != "standard":
            assert torch.allclose(left.T @ S @ left, (left.T @ S @ left).diagonal().diag(), atol=1e-10)
        turn = torch.kron(left.contiguous(), right.contiguous())
        expected = (turn.T @ block @ turn).diagonal()
        if basis == "kfac":
            expected = torch.outer((left.T @ S @ left).diagonal(), (right.T @ A @ right).diagonal()).flatten()
        assert torch.allclose(found[name].curvature.flatten(), expected, atol=1e-9)


def test_the_curvature_of_a_posterior_is_gs_diagonal_in_its_own_coordinates():
    problem = ds.Problem(cnn(), images(40), dtype=torch.float64)
    network = GaussianNetwork(problem.model, examples_of(problem).inputs[:3], 1.0)
    take(network, coordinates(problem, network, "ekfac", "both"), None)
    found = curvature_in(problem, network)
    for name, block in _dense_blocks(problem, found).items():
        layer = network.layers[name]
        turn = torch.kron(layer.whole_left().contiguous(), layer.whole_right().contiguous())
        expected = (turn.T @ block @ turn).diagonal()
        assert torch.allclose(found[name].flatten().double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_the_closed_form_minimises_the_bound_of_the_quadratic_model():
    problem = ds.Problem(mlp(), data(100))
    network = GaussianNetwork(problem.model, examples_of(problem).inputs[:3], 0.3)
    found = coordinates(problem, network, "ekfac", "inputs")
    take(network, found, None)
    closed_form(network, found, 50.0)

    def value():
        total = 0.0
        for name, layer in network.layers.items():
            h, rho = found[name].curvature, layer.log_ratio.double()
            total = (
                total + 50 * (h * layer.scale * rho.exp()).sum() / 2 + (rho.exp() - 1 - rho + layer.mean**2).sum() / 2
            )
        return total

    value().backward()
    for layer in network.layers.values():
        assert float(layer.log_ratio.grad.abs().max()) < 1e-5


def test_factors_of_a_drawn_network_are_those_of_its_draws():
    problem = ds.Problem(mlp(), data(200))
    examples = examples_of(problem)
    network = GaussianNetwork(problem.model, examples.inputs[:3], 0.5)
    network.draw_from(Draws(0))
    drawn = drawn_problem(network, problem.model, examples, problem)
    found = coordinates(drawn, network, "ekfac", "inputs")["3"]
    network.draw_from(Draws(1))
    with torch.no_grad():
        features = network.layers["1"](network.prepared(examples.inputs.repeat(200, 1))).relu()
    features = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    expected = features.T @ features / len(features)  # over other draws, many of them
    found_moment = found.right @ torch.diag((found.right.T @ expected @ found.right).diagonal()) @ found.right.T
    assert float((found_moment - expected).norm() / expected.norm()) < 0.2
    quiet = coordinates(problem, network, "ekfac", "inputs")["3"]
    A = ds.kronecker(problem).blocks["3"].right[0, 0].double()
    assert float((A - expected).norm() / expected.norm()) > 0.3  # the mean's own features are others
    assert quiet.right.shape == found.right.shape


def test_the_closed_form_of_the_outputs_factor_is_one_of_fully_connected_layers():
    problem = ds.Problem(cnn(), images(40))
    network = GaussianNetwork(problem.model, examples_of(problem).inputs[:3], 1.0)
    with pytest.raises(CertificateError, match="fully connected"):
        coordinates(problem, network, "closed_form", "both")
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 4))
    problem = ds.Problem(wide, (torch.randn(2000, 5), torch.arange(2000) % 4))
    network = GaussianNetwork(problem.model, examples_of(problem).inputs[:3], 1.0)
    made = coordinates(problem, network, "closed_form", "both")["0"]
    S = ds.kronecker(problem).blocks["0"].left[0, 0].double()
    captured = (made.left[:, :3].T @ S @ made.left[:, :3]).trace() / S.trace()
    assert float(captured) > 0.5  # of what is there, by the C − 1 directions that the weights alone tell
