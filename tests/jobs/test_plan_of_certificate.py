"""What a certificate will take, foreseen from some of the examples: priors, settings and draws count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import CertificateError, MemoryBudgetError, OptionError


def classified(num: int) -> ds.Problem:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return ds.Problem(net, (torch.randn(num, 5, generator=generator), torch.arange(num) % 3))


def test_a_certificate_is_planned_by_its_priors_and_settings() -> None:
    problem = classified(400)
    one = {stage.name: stage for stage in ds.estimate(problem, "certify", epochs=8).stages}
    assert set(one) == {
        "bases",
        "descent, 8 epochs",
        "draws for the certificate",
        "check of the noise",
        "binomial bound",
    }
    names = [stage.name for stage in ds.estimate(problem, "certify", prior=["learnt", "isotropic"], epochs=8).stages]
    assert "learning the prior, prior 1" in names
    assert "descent, 8 epochs, prior 2" in names
    assert "binomial bound" not in names  # of the learnt prior's network
    short = ds.estimate(problem, "certify", epochs=10_000, minutes=0.01)
    assert next(stage for stage in short.stages if stage.name.startswith("descent")).seconds == pytest.approx(0.6)
    with pytest.raises(OptionError, match="epoch: no such setting"):
        ds.estimate(problem, "certify", epoch=8)
    with pytest.raises(OptionError, match="epochs: settings of a certificate"):
        ds.estimate(problem, "layers", epochs=8)
    with pytest.raises(CertificateError):
        ds.estimate(ds.Problem(nn.Linear(5, 2), (torch.randn(20, 5), torch.randn(20, 2)), loss="mse"), "certify")


def test_weights_that_convolutions_draw_for_each_example_are_planned_and_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(128, 3))
    data = (torch.randn(90, 1, 6, 6), torch.arange(90) % 3)
    plan = ds.estimate(ds.Problem(net, data), "certify", epochs=1, passes=1, num_curvature=30)
    descent = next(stage for stage in plan.stages if stage.name.startswith("descent"))
    drawn = 4 * 50 * 32 * (8 * 9 + 1)  # bytes of one copy, of the larger convolution, for a batch of 50
    assert 2 * drawn < descent.num_bytes < 8 * drawn
    tight = ds.Problem(net, data, memory=drawn)
    small = ds.estimate(tight, "certify", epochs=1)
    assert not small.fits
    assert "lower batch_size" in small.advice
    with pytest.raises(MemoryBudgetError, match="a step of descent takes"):
        ds.certify(tight, epochs=1, passes=1, num_curvature=30)


def test_planning_a_certificate_leaves_the_network_and_the_next_certificate_as_they_were() -> None:
    problem = classified(200)
    before = [value.clone() for value in problem.model.state_dict().values()]
    alone = ds.certify(problem, epochs=4, passes=2)
    ds.estimate(problem, "certify", epochs=4, passes=2)
    again = ds.certify(problem, epochs=4, passes=2)
    assert all(map(torch.equal, before, problem.model.state_dict().values()))
    assert again.value == alone.value
