"""Priors: Gaussians about weights that know nothing of the examples of the bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.argument_checks import check_choice, check_count, check_number, seeded
from deepspectra.certificates.ledger import Grid
from deepspectra.certificates.losses import error_probability
from deepspectra.certificates.networks import SAMPLE, Examples, GaussianNetwork
from deepspectra.certificates.stochastic_layers import Draws
from deepspectra.errors import CertificateError, NonFiniteError, OptionError
from deepspectra.problem.input_checks import reported


class Store(Protocol):
    """Where unfinished and finished work is kept by name."""

    def read(self, name: str) -> Any:
        """What was kept, or None."""

    def write(self, name: str, value: object) -> None:
        """Keep it."""


KINDS = ("isotropic", "smooth", "learnt")
SCALES = {"isotropic": 2.0, "smooth": 2.0, "learnt": 1e-3}  # λ at first, over the mean square of the weights
BEFORE = "Give them: prior=Prior(centre=the network before training)."
OUTPUT_SCALE = 0.1  # λ of the last layer at first, where its prior has mean zero


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior: λ_l I about W₀ in each layer l, with λ_l on a grid that is charged for.

    Attributes:
        kind: "isotropic", about fresh random weights, the last layer's zero; "smooth", the same with W = V B in the
            first layer, B a fixed blur of the input image and the Gaussian on V; "learnt", about weights that were
            learnt on a part of the examples, which the bound then does not use.
        blur: standard deviation of B in pixels.
        share: of the examples from which a learnt prior is learnt.
        epochs: of learning it.
        centre: a network whose weights are W₀, chosen without the examples, such as the user's before training; by
            default they are drawn.
        grid: of λ, which is then found with the posterior and charged for. By default a `Grid`; but about learnt
            weights, where KL is a few nats and a place on a grid would cost more, λ stays a fixed multiple of the
            mean square of W₀ in its layer.
        tried: how many priors were tried on these examples to arrive at this one, itself included; the bound pays
            log(tried). One that was fixed beforehand is 1.
    """

    kind: str = "isotropic"
    blur: float = 1.5
    share: float = 0.5
    epochs: int = 15
    centre: nn.Module | None = field(default=None, repr=False)
    grid: Grid | None = None
    tried: int = 1

    def __post_init__(self) -> None:
        check_choice("prior", self.kind, KINDS)
        check_count("tried", self.tried)
        check_count("epochs", self.epochs)
        check_number("share", self.share, 0, 1)
        check_number("blur", self.blur, 0)
        if self.centre is not None and not isinstance(self.centre, nn.Module):
            raise OptionError(f"centre={type(self.centre).__name__}; expected a network, or None.")
        if self.grid is not None and not isinstance(self.grid, Grid):
            raise OptionError(f"grid={self.grid!r}; expected a Grid, or None.")

    @property
    def places(self) -> Grid | None:
        """The grid of λ; None where λ stays what it is."""
        return Grid() if self.grid is None and self.kind != "learnt" else self.grid

    @property
    def name(self) -> str:
        """What a table calls it."""
        return {"isotropic": "isotropic", "smooth": f"smooth, {self.blur:g} px", "learnt": "learnt"}[self.kind]


def priors_of(given: str | Prior | Sequence[str | Prior]) -> list[Prior]:
    """One or several, by their kinds or themselves.

    Raises:
        OptionError: none, or of an unknown kind.
    """
    candidates = [given] if isinstance(given, (str, Prior)) else list(given)
    if not candidates:
        raise OptionError("prior=[]: name at least one.")
    return [Prior(one) if isinstance(one, str) else one for one in candidates]


@dataclass(frozen=True)
class Prepared:
    """What a prior makes of a network and its examples.

    Attributes:
        plain: the network with plain weights, at W₀; the last layer's are random, for a curvature to start from.
        network: the same with Gaussian weights, at the prior.
        bound: examples of the bound, of which the prior knows nothing.
        blurred: what is done to inputs before they enter.
        kept: names of the given network's buffers that the prior and the posterior keep as they are.
    """

    plain: nn.Module
    network: GaussianNetwork
    bound: Examples
    blurred: nn.Module
    kept: tuple[str, ...]


def prepare(
    prior: Prior,
    model: nn.Module,
    examples: Examples,
    seed: int,
    store: Store | None = None,
    key: str = "learnt prior",
) -> Prepared:
    """Make the prior; one that is learnt is kept in the store under this key.

    Raises:
        CertificateError: a data-free prior of a network with parameters beyond those of fully connected layers and
            convolutions, or a smooth one without a fully connected first layer on images.

    Cost: of "learnt", its training: a gradient over its examples an epoch.
    """
    blur: nn.Module = Blur(prior.blur) if prior.kind == "smooth" else nn.Identity()
    plain, kept = fresh(model, seed) if prior.centre is None else (_fitting(prior.centre, model), ())
    plain = copy.deepcopy(plain).to(next(model.parameters())).eval().requires_grad_(True)
    sample = examples.inputs[:SAMPLE]
    if prior.kind == "learnt":
        taught, rest = split(len(examples), prior.share, seed)
        known = None if store is None else store.read(key)
        if known is None:
            learn(plain, examples.some(taught), prior.epochs, seed)
            if store is not None:
                store.write(key, dict(plain.state_dict()))
        else:
            plain.load_state_dict(known)
            plain.eval()
        examples = examples.some(rest)
    scale = SCALES[prior.kind]
    network = GaussianNetwork(plain, sample, 1.0)
    with reported(CertificateError, f"{type(model).__name__} does not work with Gaussian weights in its layers"):
        network.draw_from(Draws(seed))
        error_probability(network.outputs(network.prepared(sample)), examples.labels[:SAMPLE])
    if prior.kind != "learnt" and network.held:
        raise CertificateError(
            f"{', '.join(network.held[:3])} cannot be Gaussian here (only weights of nn.Linear and nn.Conv2d that "
            "are used once can), and without data there is nothing to hold them at. Use prior='learnt'."
        )
    if prior.kind == "smooth":
        if network.first is None or examples.inputs.ndim != 4:
            raise CertificateError(
                "a smooth prior is one of images (B, C, H, W) that a fully connected first layer sees, in an "
                "nn.Sequential. Use prior='isotropic'."
            )
        examples = Examples(blur(examples.inputs), examples.labels)
    for name, layer in network.layers.items():
        mean_square = float(layer.prior_mean.square().mean())
        if name == network.output and prior.kind != "learnt" and prior.centre is None:
            layer.prior_mean.zero_()
            layer.log_scale.data.fill_(math.log(OUTPUT_SCALE))
        else:
            layer.log_scale.data.fill_(math.log(max(scale * mean_square, 1e-12)))
    return Prepared(plain, network, examples, blur, kept)


def _fitting(centre: nn.Module, model: nn.Module) -> nn.Module:
    """The centre, if it is the same network with other weights.

    Raises:
        OptionError: parameters have other names or shapes, or are not finite.
    """
    given, expected = ({name: tuple(p.shape) for name, p in one.named_parameters()} for one in (centre, model))
    for name in (*expected, *given):
        if given.get(name) != expected.get(name):
            raise OptionError(
                f"centre= must be the same network with other weights; {name} is {given.get(name, 'not there')}, and "
                f"{expected.get(name, 'not there')} in the network that is certified."
            )
    if broken := [name for name, p in centre.named_parameters() if not bool(p.isfinite().all())]:
        raise OptionError(f"centre= has NaN or infinite weights, in {broken[0]}.")
    return centre


def split(num: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of a random part of the examples, and of the rest."""
    order = torch.randperm(num, generator=seeded(seed))
    taken = min(num - 1, max(1, round(share * num)))
    return order[:taken].sort().values, order[taken:].sort().values


def fresh(model: nn.Module, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The same network with new random weights, as its layers draw them, and statistics as before any data.

    Buffers that no layer resets stay, such as the mean and scale of inputs, and are named: they must be constants,
    and not made of the examples.

    Raises:
        CertificateError: a module with parameters of its own has no `reset_parameters`, or parameters that it leaves.
    """
    twin = copy.deepcopy(model)
    values = {name: value for name, value in twin.state_dict(keep_vars=True).items() if value.is_floating_point()}
    given = {name: value.detach().clone() for name, value in values.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for value in values.values():
            value.fill_(math.nan)  # what is not drawn anew is then seen
        for name, module in twin.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise CertificateError(
                    f"{name or 'the model'} ({type(module).__name__}) has no reset_parameters, so its weights before "
                    f"training are not known. {BEFORE}"
                )
        left = [name for name, value in values.items() if bool(value.isnan().any())]
        for name in left:
            if isinstance(values[name], nn.Parameter):
                raise CertificateError(
                    f"{name} is not drawn anew by the reset_parameters of its module, and would keep what training "
                    f"made of it. {BEFORE}"
                )
            values[name].copy_(given[name])
    return twin, tuple(left)


def learn(model: nn.Module, examples: Examples, epochs: int, seed: int, batch_size: int = 128) -> None:
    """Train in place by Adam on the cross-entropy, the rate falling to zero, and leave it in evaluation mode.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of dropout
        _descend(model.requires_grad_(True).train(), examples, epochs, seed, batch_size)
    model.eval()


def _descend(model: nn.Module, examples: Examples, epochs: int, seed: int, batch_size: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch_size = min(batch_size, max(8, len(examples) // 20))
    steps = epochs * math.ceil(len(examples) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(2, steps))
    generator = seeded(seed)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(examples), generator=generator), batch_size):
            if len(chosen) == 1 and len(examples) > 1:
                continue  # of which batch norm can learn nothing
            some = examples.some(chosen)
            loss = F.cross_entropy(model(some.inputs), some.labels)
            if not math.isfinite(float(loss.detach())):
                raise NonFiniteError(
                    f"the loss of the prior's training became {float(loss.detach())}. Check the inputs."
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


class Blur(nn.Module):
    """B: each channel of images (B, C, H, W) convolved with a Gaussian of so many pixels, zeros beyond the edge."""

    def __init__(self, pixels: float) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        """The blurred images."""
        rows, columns = (self._matrix(size, x) for size in x.shape[-2:])
        return rows @ x @ columns

    def _matrix(self, size: int, like: Tensor) -> Tensor:
        places = torch.arange(size, dtype=like.dtype, device=like.device)
        away = (places[:, None] - places) / self.pixels
        return (-away.square() / 2).exp() / (math.sqrt(2 * math.pi) * self.pixels)
