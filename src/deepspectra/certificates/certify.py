"""Certificates of a classifier: a bound on its error on unseen data that holds with a stated probability."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.argument_checks import LayerProgress, check_seed, seeded
from deepspectra.certificates.binomial_bounds import monte_carlo_bound
from deepspectra.certificates.independence import check_independence
from deepspectra.certificates.ledger import Ledger
from deepspectra.certificates.networks import (
    Examples,
    GaussianNetwork,
    examples_of,
    given_examples,
    given_inputs,
    wrong,
)
from deepspectra.certificates.optimise import Descent
from deepspectra.certificates.plain_networks import (
    Deterministic,
    TestBound,
    of_a_part,
    of_the_network,
    on_unseen,
)
from deepspectra.certificates.posterior import curvature_in
from deepspectra.certificates.priors import Prepared, Prior, Store, prepare, priors_of
from deepspectra.certificates.settings import Settings
from deepspectra.certificates.stochastic_layers import Draws
from deepspectra.dataframes import text_table
from deepspectra.errors import OptionError
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.results import Result, origin

POINTS = 400  # of a layer's variances that are kept
CHECK_PASSES = 4  # over the examples of the quadratic model's check
TEST_PASSES = 5
FAR = 1_000_000_003  # beyond the seeds of all that descent draws, 1,000 a seed and one an epoch


@dataclass(frozen=True)
class LayerPosterior:
    """What became of one layer.

    Attributes:
        divergence: KL of its posterior from its prior, nats.
        scale: λ of its prior.
        num_parameters: of the layer.
        num_kept: of them, those whose posterior may differ from the prior.
        curvature: (points,) diagonal of G in the posterior's coordinates, descending, of the mean cross-entropy at
            the posterior's mean.
        variance: (points,) posterior variance s of the same coordinates.
        loss_increase: ½ Σ h s over all coordinates, what the quadratic model says that its noise costs.
    """

    divergence: float
    scale: float
    num_parameters: int
    num_kept: int
    curvature: Tensor
    variance: Tensor
    loss_increase: float


@dataclass(frozen=True, repr=False)
class Certificate(Result):
    """An upper bound on the error of a classifier on unseen data, and everything it rests on.

    It is of the stochastic network: for each example a new draw of the weights. It holds with probability
    `ledger.confidence` over the examples, which must be independent draws of what the network will meet.

    Attributes:
        value: the certificate.
        ledger: what it is charged; it is computed from this alone.
        prior: about what the prior lies.
        settings: how the posterior was found.
        empirical_error: share of errors of the stochastic network on the examples of the bound.
        empirical_bound: its Monte-Carlo upper bound, from which the certificate follows.
        num_draws: behind it.
        mean_error: of the network at the posterior's mean, on the same examples.
        test_error, mean_test_error: of the stochastic network and of the mean on test data; NaN without.
        test_bounds: binomial bounds of plain networks on examples they have not seen, with the same confidence.
        deterministic: certificate of the unmodified network; None without data for it.
        loss_increase: (½ tr(HΣ), measured) increase of the cross-entropy by the posterior's noise.
        layers: name → posterior.
        curve: (error, KL) of each epoch of descent.
        num_epochs: of descent that were planned; fewer were done if the minutes ran out.
        num_tried: priors that were tried in this call, and charged.
        network: that is certified; `predict` draws from it.
        mean_network: at the posterior's mean, of inputs that went through `blur`.
        blur: B of a smooth prior, else the identity.
        constant_error: share of those examples that are not of the most frequent class.
        kept: buffers of the given network that are held as they are.
    """

    value: float
    ledger: Ledger
    prior: Prior
    settings: Settings
    empirical_error: float
    empirical_bound: float
    num_draws: int
    mean_error: float
    test_error: float
    mean_test_error: float
    test_bounds: tuple[TestBound, ...]
    deterministic: Deterministic | None
    loss_increase: tuple[float, float]
    layers: Mapping[str, LayerPosterior]
    curve: tuple[tuple[float, float], ...]
    num_epochs: int
    num_tried: int
    network: GaussianNetwork
    mean_network: nn.Module
    blur: nn.Module
    constant_error: float
    kept: tuple[str, ...]

    @property
    def is_vacuous(self) -> bool:
        """Whether guessing does as well: the bound is no smaller than the error of the most frequent class."""
        return self.value >= self.constant_error

    def predict(self, x: Tensor, seed: int = 0) -> Tensor:
        """Labels (B,) of inputs as the certified network gives them, a draw of the weights for each."""
        return _drawn_labels(self.network, self.network.prepared(self.blur(x)), Draws(seed))

    def _of_the_network(self, plain: Deterministic) -> str:
        """What its certificate is worth, beside the binomial bound."""
        sure = self.ledger.must_hold("disagreement", plain.delta).confidence
        return plain.sentence(min(one.value for one in self.test_bounds), sure)

    @property
    def sentences(self) -> list[str]:
        """What it says, what it does not, and which bound is tighter."""
        found = [
            f"With probability {self.ledger.confidence:.4g} the stochastic network errs on at most {self.value:.4f} "
            f"of unseen data (prior {self.prior.name}; error {self.empirical_error:.4f} on the "
            f"{self.ledger.num_examples:,} examples, KL {self.ledger.total_divergence:.4g} nats)."
        ]
        if self.is_vacuous:
            found.append("That is vacuous: guessing a class does as well.")
        if self.kept:
            found.append(
                f"{', '.join(self.kept)} of the network were held as given: they must not come from the examples."
            )
        found += [one.sentence(self.value) for one in self.test_bounds]
        if self.deterministic is not None:
            found.append(self._of_the_network(self.deterministic))
        else:
            found.append(
                "Of the unmodified network nothing is certified: that takes data it has not seen, labelled or not."
            )
        if not math.isnan(self.test_error):
            found.append(
                f"On test data the stochastic network errs on {self.test_error:.4f}, its mean on "
                f"{self.mean_test_error:.4f}."
            )
        found += self.settings.sentences(self.prior.kind)
        if len(self.curve) < self.num_epochs:
            found.append(
                f"Descent was stopped after {len(self.curve)} of {self.num_epochs} epochs; the bound is valid, "
                "and may be lower after all of them."
            )
        return found

    def __str__(self) -> str:
        rows = [
            (name, one.divergence, one.scale, float(one.num_parameters), float(one.num_kept))
            for name, one in self.layers.items()
        ]
        table = text_table(("layer", "KL", "λ of prior", "parameters", "of them free"), rows)
        model, measured = self.loss_increase
        check = f"Noise raises the cross-entropy by {measured:.3g}; ½ tr(HΣ) says {model:.3g}."
        return "\n\n".join(["\n".join(self.sentences), table, str(self.ledger), check])


def certify(
    problem: Problem,
    prior: str | Prior | Sequence[str | Prior] = "isotropic",
    *,
    test: Any = None,
    unlabelled: Tensor | None = None,
    seed: int = 0,
    progress: LayerProgress | None = None,
    store: Store | None = None,
    **settings: Any,
) -> Certificate:
    """A PAC-Bayes bound on the error of a network with Gaussian weights, and others to hold it against.

    With probability 1 − δ over n independent examples, for all posteriors Q at once and a prior P fixed before them,
    kl(R̂(Q) ‖ R(Q)) ≤ (KL(Q ‖ P) + log(2√n/δ) + what else the ledger charges)/n. The posterior has its variances in
    the eigenbasis of the layers' Kronecker factors; means, variances and prior scales are found by descent on the
    bound itself, the 0-1 loss integrated over the last layer's weights. λ is then put on its grid, and R̂ is bounded
    from independent draws, one an example and pass.

    Args:
        problem: a classifier with one label an example. Of its network the architecture counts, and its weights for
            `Certificate.deterministic` and the test bound alone.
        prior: "isotropic", "smooth" or "learnt", or a `Prior`; of several the best is kept and all are charged.
        test: (x, y) that neither the network nor the posterior has seen; for test errors and the binomial bound.
            Without, the bound of a network trained on 80 % of the examples is given, on the others.
        unlabelled: inputs that neither has seen; by default those of `test`.
        seed: of the prior's weights, of the split and of every draw.
        progress: called with (epochs done, epochs in all, what is being done).
        store: with `read(name)` and `write(name, value)`, for a stopped call to be taken up.
        settings: those of `Settings` by name (basis, bound, epochs, minutes, …), and `variant`, a published way to
            find the posterior: "base", "appr", "iter" or "iter.m".

    Raises:
        CertificateError: no classifier with a label an example, or a network that ends otherwise than in a fully
            connected layer; with a data-free prior, one with other parameters than those of such layers and
            convolutions.
        OptionError: a setting out of range.

    Cost: about two gradients an epoch, and `passes` forward; of a wide first layer on fixed inputs a sixth of that.

    Source: Dziugaite and Roy 2017, arXiv 1703.11008; Maurer 2004, cs/0411099 (the bound's form); Wu et al. 2020,
    arXiv 2010.04261, section 6 (the basis). Departures: (1) the 0-1 loss itself is descended on; (2) each layer has
    a λ of its own, and is charged for it; (3) variances are carried over when the basis changes; (4) λ cannot leave
    its grid.
    """
    check_problem(problem)
    if problem.batches.group.size > 1:
        raise OptionError(
            "certify works in one process: give it the problem itself, and not what sharded() made of it."
        )
    check_seed(seed)
    chosen = Settings.of(**settings)
    examples = examples_of(problem)
    priors = priors_of(prior)
    seen = None if test is None else given_examples(test, problem)
    unseen = {} if seen is None else {"test=": seen.inputs}
    if unlabelled is not None:
        unseen["unlabelled="] = given_inputs("unlabelled=", unlabelled, problem)
    check_independence(examples, unseen)
    trial = _Trial(problem, examples, chosen, seed, store, progress, len(priors))
    found = [trial.of(one, number) for number, one in enumerate(priors)]
    best = min(found, key=lambda one: one.value)
    return trial.beside(best, seen, unseen.get("unlabelled=", unseen.get("test=")))


@dataclass
class _Trial:
    """Certificates of one problem, of one prior after the other."""

    problem: Problem
    examples: Examples
    settings: Settings
    seed: int
    store: Store | None
    progress: LayerProgress | None
    num_priors: int

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def of(self, prior: Prior, number: int) -> Certificate:
        """Of one prior: posterior, ledger and draws."""
        name = f"prior {number + 1}" if self.num_priors > 1 else "descent"
        settings, n_mc = self.settings, self.settings.passes
        learnt = "learnt prior" + name.removeprefix("descent").removeprefix("prior")
        made = prepare(prior, self.problem.model, self.examples, self.seed, self.store, learnt)
        ledger = Ledger(len(made.bound), settings.delta, bound=settings.bound)
        # the draws must hold for whichever prior is best
        share = settings.monte_carlo_delta / self.num_priors
        ledger = ledger.must_hold("Monte Carlo", settings.monte_carlo_delta)
        if self.num_priors > 1:
            ledger = ledger.tried("priors of this call", self.num_priors)
        if prior.tried > 1:
            ledger = ledger.tried("priors before", prior.tried)
        descent = Descent(made.network, made.plain, made.bound, self.problem, prior.places, settings, self.seed)
        descent.run(self.store, name, self.progress)
        ledger = _settled(made.network, prior, ledger)
        ledger = replace(ledger, seeds={"prior and split": self.seed, "draws": _draws_seed(self.seed)})
        errors = self._errors(made, n_mc, name)
        num_draws = n_mc * len(made.bound)
        above = monte_carlo_bound(errors / num_draws, num_draws, share)
        increase, layers = self._checked(made, ledger)
        mean = made.network.mean_model(made.plain)
        return Certificate(
            value=ledger.certified(above),
            ledger=ledger,
            prior=prior,
            settings=settings,
            empirical_error=errors / num_draws,
            empirical_bound=above,
            num_draws=num_draws,
            mean_error=wrong(mean, made.bound) / len(made.bound),
            test_error=math.nan,
            mean_test_error=math.nan,
            test_bounds=(self._of_prior(made),) if prior.kind == "learnt" else (),
            deterministic=None,
            loss_increase=increase,
            layers=layers,
            curve=tuple(descent.curve),
            num_epochs=descent.num_epochs,
            num_tried=self.num_priors,
            network=made.network,
            mean_network=mean,
            blur=made.blurred,
            constant_error=1 - float(made.bound.labels.bincount().max()) / len(made.bound),
            kept=made.kept,
            **origin(self.began, self.problem, "PAC-Bayes", seed=self.seed),
        )

    def beside(self, found: Certificate, test: Examples | None, inputs: Tensor | None) -> Certificate:
        """With test errors, the binomial bound and the certificate of the network as it is."""
        model, bounds = self.problem.model, found.test_bounds
        if test is not None:
            seen = Examples(found.blur(test.inputs), test.labels)
            draws = Draws(self.seed + 2)
            errors = num_wrong(found.network, found.network.prepared(seen.inputs), seen.labels, TEST_PASSES, draws)
            found = replace(
                found,
                test_error=errors / (TEST_PASSES * len(test)),
                mean_test_error=wrong(found.mean_network, seen) / len(test),
            )
            bounds = (*bounds, on_unseen(model, test, self._delta, "your network"))
        elif not bounds:
            bounds = (of_a_part(model, self.examples, self._delta, self.seed),)
        plain = None
        if inputs is not None:
            labels = found.predict(inputs, _draws_seed(self.seed) + 1)
            plain = of_the_network(model, inputs, labels, found.value, found.settings.disagreement_delta)
        seconds = time.perf_counter() - self.began
        return replace(found, test_bounds=bounds, deterministic=plain, seconds=seconds)

    @property
    def _delta(self) -> float:
        """What the certificate may fail with, and so may what stands beside it."""
        return self.settings.delta + self.settings.monte_carlo_delta

    def _of_prior(self, made: Prepared) -> TestBound:
        """Of the network that the prior lies about, on the examples of the bound, which it has not seen."""
        taught = len(self.examples) - len(made.bound)
        return on_unseen(made.plain, made.bound, self._delta, f"the network trained on {taught:,} examples")

    def _errors(self, made: Prepared, passes: int, name: str) -> int:
        """Of independent draws, all examples a pass."""
        inputs = made.network.prepared(made.bound.inputs)
        total, draws = 0, Draws(_draws_seed(self.seed))
        for done in range(passes):
            if self.progress is not None:
                self.progress(done, passes, f"{name}: drawing for the certificate")
            total += num_wrong(made.network, inputs, made.bound.labels, 1, draws)
        return total

    def _checked(self, made: Prepared, ledger: Ledger) -> tuple[tuple[float, float], dict[str, LayerPosterior]]:
        """How well the quadratic model says what the noise costs, and each layer's posterior."""
        order = torch.randperm(len(made.bound), generator=seeded(self.seed))
        some = made.bound.some(order[: self.settings.num_curvature])
        mean = made.network.mean_model(made.plain)
        problem = Problem(mean, (some.inputs, some.labels), memory=self.problem.memory)
        curvature = curvature_in(problem, made.network)
        layers = {}
        for name, layer in made.network.layers.items():
            variances = torch.full_like(layer.prior_mean, layer.scale, dtype=torch.float64)
            variances[:, : layer.mean.shape[1]] = layer.variances()
            h = curvature.get(name, torch.zeros_like(variances))
            kept_h = h[:, : layer.mean.shape[1]].flatten()
            order = kept_h.argsort(descending=True)
            # evenly in the logarithm of their rank: most coordinates are flat, and the few that are not matter
            ranks = torch.logspace(0, math.log10(len(order)), POINTS, dtype=torch.float64)
            places = torch.unique(ranks.round().long().clamp(1, len(order)) - 1)
            order = order[places.to(order.device)]
            layers[name] = LayerPosterior(
                divergence=ledger.divergence[name],
                scale=layer.scale,
                num_parameters=layer.prior_mean.numel(),
                num_kept=layer.mean.numel(),
                curvature=kept_h[order].cpu(),
                variance=layer.variances().flatten()[order].cpu(),
                loss_increase=float((h * variances).sum()) / 2,
            )
        measured = _cross_entropy(made, some, self.seed) - problem.loss()
        return (sum(one.loss_increase for one in layers.values()), measured), layers


def _settled(network: GaussianNetwork, prior: Prior, ledger: Ledger) -> Ledger:
    """Put every λ on the grid, if they were free, and enter what that and the divergences cost."""
    grid = prior.places
    for name, layer in network.layers.items():
        if grid is not None:
            place = grid.nearest(layer.scale)
            layer.log_scale.data.fill_(math.log(grid.variance(place)))
            ledger = ledger.charged(f"λ of {name}, place {place} of its grid", grid.nats(place))
    return replace(ledger, divergence={name: float(kl.detach()) for name, kl in network.divergence().items()})


def _draws_seed(seed: int) -> int:
    """Of the draws of the certificate, which descent has never seen."""
    return (1000 * seed + FAR) % 2**63


@torch.no_grad()
def _drawn_labels(network: GaussianNetwork, inputs: Tensor, draws: Draws) -> Tensor:
    """(B,) labels, a draw an example."""
    network.draw_from(draws)
    return torch.cat([network.outputs(x).drawn(draws).argmax(1) for x in torch.split(inputs, network.chunk)])


def num_wrong(network: GaussianNetwork, inputs: Tensor, labels: Tensor, passes: int, draws: Draws) -> int:
    """Errors of independent draws, one an example and pass, on prepared inputs."""
    return sum(int((_drawn_labels(network, inputs, draws) != labels).sum()) for _ in range(passes))


@torch.no_grad()
def _cross_entropy(made: Prepared, some: Examples, seed: int) -> float:
    """Mean over draws."""
    draws, inputs = Draws(seed + 1), made.network.prepared(some.inputs)
    made.network.draw_from(draws)
    total = 0.0
    for _ in range(CHECK_PASSES):
        chunk = made.network.chunk
        for x, y in zip(torch.split(inputs, chunk), torch.split(some.labels, chunk), strict=True):
            logits = made.network.outputs(x).drawn(draws).double()
            total += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    return total / (CHECK_PASSES * len(some))
