"""What is known of plain networks beside the certificate: the binomial bound, and the network as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepspectra.certificates.binomial_bounds import binomial_bound
from deepspectra.certificates.networks import CHUNK, Examples, wrong
from deepspectra.certificates.priors import fresh, learn, split

HELD_OUT = 0.2  # of the examples, where no test data are given
EPOCHS = 3  # of the network that is trained on the others


@dataclass(frozen=True)
class TestBound:
    """The bound of one fixed network from examples that it has not seen, by Clopper and Pearson.

    Attributes:
        num_errors: of it.
        num_examples: that it had not seen.
        value: the bound, with the confidence of the certificate.
        network: whose it is, in words.
    """

    num_errors: int
    num_examples: int
    value: float
    network: str

    __test__ = False  # no test, whatever its name begins with

    def sentence(self, certificate: float) -> str:
        """Which is tighter."""
        tighter = "is tighter" if self.value < certificate else "is looser"
        return (
            f"The binomial bound of {self.network} {tighter}: {self.value:.4f}, from {self.num_errors:,} errors on "
            f"{self.num_examples:,} examples that it had not seen."
        )


@dataclass(frozen=True)
class Deterministic:
    """A certificate of the unmodified network: that of the stochastic one and how often the two disagree.

    R(f) ≤ R(Q) + P(f(x) ≠ h_w(x)), w ~ Q: where f errs, h_w errs too or they disagree. The second term needs no
    labels.

    Attributes:
        value: the bound on the error of the network as it is.
        disagreement: share of inputs, each with a draw of its own, on which the two disagree.
        disagreement_bound: its binomial upper bound.
        num_inputs: that neither had seen.
        delta: probability that this bound fails; to be added to those of the ledger.
    """

    value: float
    disagreement: float
    disagreement_bound: float
    num_inputs: int
    delta: float

    def sentence(self, binomial: float, confidence: float) -> str:
        """What it is worth, beside the binomial bound; both terms hold with this probability."""
        if self.value >= 1:
            worth = "which is vacuous"
        else:
            worth = "looser than the binomial bound" if self.value > binomial else "tighter than the binomial bound"
        return (
            f"The unmodified network errs on at most {self.value:.4f} (with probability {confidence:.4g}), "
            f"{worth}: it disagrees with the stochastic one on {self.disagreement:.4f} of {self.num_inputs:,} unseen "
            "inputs, whose labels were not used."
        )


def on_unseen(model: nn.Module, unseen: Examples, delta: float, network: str) -> TestBound:
    """Of a network, on examples that had no part in it. Cost: a forward pass over them."""
    errors, num = wrong(model, unseen), len(unseen)
    return TestBound(errors, num, binomial_bound(errors, num, delta), network)


def of_a_part(model: nn.Module, examples: Examples, delta: float, seed: int) -> TestBound:
    """Of the same network trained on four fifths of the examples, on the rest. Cost: three epochs of training."""
    taught, rest = split(len(examples), 1 - HELD_OUT, seed)
    twin, _ = fresh(model, seed)
    learn(twin, examples.some(taught), EPOCHS, seed)
    name = f"the same network trained on {len(taught):,} of the examples"
    return on_unseen(twin, examples.some(rest), delta, name)


@torch.no_grad()
def of_the_network(
    model: nn.Module, inputs: Tensor, drawn: Tensor, certificate: float, delta: float
) -> Deterministic:
    """From labels that the stochastic network drew for inputs that neither has seen.

    Source: the construction of arXiv 2602.23128, a certified surrogate and its disagreement.
    """
    labels = torch.cat([model(x).argmax(-1) for x in torch.split(inputs, CHUNK)])
    differ = int((labels != drawn).sum())
    above = binomial_bound(differ, len(inputs), delta)
    return Deterministic(min(1.0, certificate + above), differ / len(inputs), above, len(inputs), delta)
