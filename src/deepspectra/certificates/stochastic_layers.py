"""Layers whose weights are Gaussian, in rotated coordinates, and what they give: each example a draw of its own.

Weights and bias of a layer are one matrix W (o, d), the bias its last column. Prior: W₀ + √λ E, with E standard
normal.
Posterior: W₀ + √λ U_S (M + √exp(ρ) ∘ E) U_Aᵀ, so that KL = ½ Σ (exp(ρ) − 1 − ρ + M²) whatever λ, W₀ and the rotations
are. Of the inputs' directions only the first k may be kept: in the others the posterior is the prior, exactly, and
they cost nothing.

B examples, T positions; x̃ = U_Aᵀ x (k).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.argument_checks import seeded

POOL = 2**22  # numbers


class Draws:
    """Standard normal numbers from a seed, of the CPU whatever the device is."""

    def __init__(self, seed: int) -> None:
        self.generator = seeded(seed)

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """New ones."""
        return torch.randn(shape, generator=self.generator, dtype=like.dtype).to(like.device)


class PooledDraws(Draws):
    """The same numbers again and again, from another place each time: enough to learn from, and never to certify."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.pool = torch.randn(POOL, generator=self.generator)

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Of the pool, from a random place on."""
        size = math.prod(shape)
        if size > POOL // 2:
            return super().normal(shape, like)
        start = int(torch.randint(POOL - size, (), generator=self.generator))
        return self.pool[start : start + size].view(shape).to(like)


class Outputs(NamedTuple):
    """Independent normal logits, given the features that enter the last layer."""

    mean: Tensor  # (B, C)
    variance: Tensor  # (B, C), of rotated logits where `rotation` is given
    rotation: Tensor | None = None  # (C, C): logits are rotation @ rotated ones

    def drawn(self, draws: Draws) -> Tensor:
        """Logits (B, C), one draw an example."""
        noise = self.variance.sqrt() * draws.normal(self.variance.shape, self.variance)
        return self.mean + (noise if self.rotation is None else noise @ self.rotation.T)


class GaussianLayer(nn.Module):
    """What fully connected layers and convolutions share: the posterior, its divergence, its coordinates.

    Args:
        prior_mean: W₀ (o, d), the bias last if there is one.
        has_bias: whether the last column is a bias.
        scale: λ.

    Attributes:
        mean: M (o, k).
        log_ratio: ρ (o, k), of the posterior's variance to λ.
        log_scale: log λ.
        left: U_S (o, o), or None for the identity.
        right: U_A (d, k), or None for the identity.
        is_noisy: draws, or else the mean alone.
        draws: where noise comes from.
    """

    prior_mean: Tensor
    left: Tensor | None
    right: Tensor | None

    def __init__(self, prior_mean: Tensor, has_bias: bool, scale: float) -> None:
        super().__init__()
        self.has_bias = has_bias
        self.is_noisy = True
        self.draws = Draws(0)
        self.register_buffer("prior_mean", prior_mean)
        self.register_buffer("left", None)
        self.register_buffer("right", None)
        self.mean = nn.Parameter(torch.zeros_like(prior_mean))
        self.log_ratio = nn.Parameter(torch.zeros_like(prior_mean))
        self.log_scale = nn.Parameter(prior_mean.new_tensor(math.log(scale)))

    @property
    def scale(self) -> float:
        """λ, as the draws have it."""
        return math.exp(float(self.log_scale.detach()))

    def turn(self, left: Tensor | None, right: Tensor | None, num_kept: int | None = None) -> None:
        """Take other coordinates, carry the posterior over, and keep the first directions of the inputs.

        The mean is the same in the new coordinates. Variances there are those of the old Gaussian,
        S′ = (Q_S ∘ Q_S) S (Q_A ∘ Q_A)ᵀ with Q = U′ᵀ U; what correlates in the new coordinates is dropped. Directions
        that were not kept have the prior's variance.
        """
        o, d = self.prior_mean.shape
        old_right = self.whole_right()
        ratio = torch.ones(o, d, dtype=torch.float64, device=self.prior_mean.device)
        mean = torch.zeros_like(ratio)
        kept = self.mean.shape[1]
        ratio[:, :kept] = self.log_ratio.detach().double().exp()
        mean[:, :kept] = self.mean.detach().double()
        q_left = self._identity(o) if left is None else left.double()
        q_left = q_left.T @ self.whole_left()
        new_right = self._identity(d) if right is None else right.double()
        q_right = new_right.T @ old_right
        mean = q_left @ mean @ q_right.T
        ratio = q_left.square() @ ratio @ q_right.square().T
        num_kept = d if num_kept is None else min(num_kept, d)
        like = self.prior_mean
        self.left = None if left is None else left.to(like)
        self.right = None if right is None and num_kept == d else new_right[:, :num_kept].to(like)
        self.mean = nn.Parameter(mean[:, :num_kept].to(like).contiguous())
        self.log_ratio = nn.Parameter(ratio[:, :num_kept].log().to(like).contiguous())

    def divergence(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """KL(Q ‖ P) of the layer; certificates are of its double precision, and descent needs less."""
        mean, ratio = self.mean.to(dtype), self.log_ratio.to(dtype)
        return (ratio.expm1() - ratio + mean.square()).sum() / 2

    def posterior_mean(self) -> Tensor:
        """Weights and bias (o, d) at the posterior's mean."""
        return self.prior_mean + self._out(math.sqrt(self.scale) * self._across(self.mean.detach()))

    @torch.no_grad()
    def move_to(self, weights: Tensor) -> None:
        """Put the posterior's mean at weights (o, d), in the directions that are kept."""
        deviation = (weights - self.prior_mean) / math.sqrt(self.scale)
        deviation = deviation if self.left is None else self.left.T @ deviation
        self.mean.copy_(deviation if self.right is None else deviation @ self.right)

    def quiet(self, x: Tensor) -> Tensor:
        """Outputs at the posterior's mean, given inputs as `forward` takes them."""
        self.is_noisy = False
        try:
            found: Tensor = self.forward(x)
        finally:
            self.is_noisy = True
        return found

    def variances(self) -> Tensor:
        """Of the posterior, λ exp(ρ) (o, k), in its coordinates."""
        return self.scale * self.log_ratio.detach().double().exp()

    def _across(self, rotated: Tensor) -> Tensor:
        """(o, k) → (o, d) over inputs."""
        return rotated if self.right is None else rotated @ self.right.T

    def _out(self, rotated: Tensor) -> Tensor:
        """Over outputs."""
        return rotated if self.left is None else self.left @ rotated

    def _identity(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64, device=self.prior_mean.device)

    def whole_left(self) -> Tensor:
        """U_S (o, o) float64."""
        return self._identity(len(self.prior_mean)) if self.left is None else self.left.double()

    def whole_right(self) -> Tensor:
        """U_A (d, d) float64, with the directions that are not kept."""
        d = self.prior_mean.shape[1]
        if self.right is None:
            return self._identity(d)
        kept = self.right.double()
        if kept.shape[1] == d:
            return kept
        whole, _ = torch.linalg.qr(torch.cat([kept, self._identity(d)], 1))
        return torch.cat([kept, whole[:, kept.shape[1] :]], 1)


class GaussianLinear(GaussianLayer):
    """A fully connected layer: each example's outputs are drawn, for given its inputs they are Gaussian.

    Drawn for each example by itself, they have the distribution that a draw of the weights gives to that example;
    over examples they are independent, as draws of the weights for each of them would be.

    Attributes:
        noted: where moments are put, if that is all that is asked for, and nothing is drawn.
    """

    noted: list[Outputs] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, d) to a draw (B, o), or to the mean."""
        found = self.moments(x)
        if self.noted is not None:
            self.noted.append(found)
            return found.mean
        return found.drawn(self.draws) if self.is_noisy else found.mean

    def moments(self, x: Tensor) -> Outputs:
        """Mean and variances of the outputs, given inputs (B, d) or what `prepared` made of them."""
        if self.takes_prepared:
            turned, rest, base = torch.split(x, [self.mean.shape[1], 1, len(self.mean)], 1)
        else:
            turned, rest, base = self._parts(x)
        root = (self.log_scale / 2).exp()
        mean = base + self._back(F.linear(turned, root * self.mean))
        if not self.is_noisy:
            return Outputs(mean, torch.zeros_like(mean))
        variance = root.square() * (F.linear(turned.square(), self.log_ratio.exp()) + rest)
        return Outputs(mean, variance, self.left)

    takes_prepared = False

    @torch.no_grad()
    def prepared(self, x: Tensor) -> Tensor:
        """What the layer needs of inputs that stay the same (B, k + 1 + o): most of it is then never done again."""
        return torch.cat(self._parts(x), 1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̃ (B, k), the squared length of what is not kept (B, 1), and W₀ x (B, o)."""
        if self.has_bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        base = F.linear(x, self.prior_mean)
        if self.right is None:
            return x, x.new_zeros(len(x), 1), base
        turned = x @ self.right
        rest = (x.square().sum(1, keepdim=True) - turned.square().sum(1, keepdim=True)).clamp_min(0)
        return turned, rest if self.right.shape[1] < self.right.shape[0] else torch.zeros_like(rest), base

    def _back(self, rotated: Tensor) -> Tensor:
        """Rows (B, o) over outputs."""
        return rotated if self.left is None else rotated @ self.left.T


class GaussianConvolution(GaussianLayer):
    """A convolution: weights are drawn explicitly, for each example by itself, for positions share them.

    Noise of every position by itself would be another distribution, and a certificate of another network. Signs on
    one shared draw (flipout, Wen et al. 2018, arXiv 1803.04386) would save the draws alone: patches are turned and
    multiplied example by example in any case. Measured on both convolutions of a LeNet, 500 examples a step: 1.6 to
    1.8 times the time, gradients of the means of the same variance, of log variances 1.1 to 1.5 times as much.
    """

    def __init__(self, prior_mean: Tensor, has_bias: bool, scale: float, like: nn.Conv2d) -> None:
        super().__init__(prior_mean, has_bias, scale)
        self.kernel = like.weight.shape
        self.options: dict[str, Any] = {
            "stride": like.stride,
            "padding": like.padding,
            "dilation": like.dilation,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to those of weights drawn for each example, or of the mean."""
        d = self.prior_mean.shape[1]
        weight = self.prior_mean[:, : d - self.has_bias].view(self.kernel)
        bias = self.prior_mean[:, -1] if self.has_bias else None
        base = F.conv2d(x, weight, bias, **self.options)
        patches = F.unfold(x, self.kernel[2:], **self.options)  # (B, d, T)
        if self.has_bias:
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        if self.right is not None:
            patches = self.right.T @ patches
        weights: Tensor = self.mean
        if self.is_noisy:
            shape = (len(x), *self.mean.shape)
            weights = self.mean + (self.log_ratio / 2).exp() * self.draws.normal(shape, self.mean)
        deviation = self._out((self.log_scale / 2).exp() * (weights @ patches))
        found: Tensor = base + deviation.view(base.shape)
        return found
