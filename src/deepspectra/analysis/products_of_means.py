"""Products of means for means of products, and what the mean feature of a layer makes of its gradients."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.analysis.gram_spectrum import GramSpectrum, spectrum_of
from deepspectra.operators.parts import Decomposition
from deepspectra.rows.averages import Averages, positive
from deepspectra.rows.features_and_errors import counted, membership
from deepspectra.rows.held_rows import gram_of, moment_of_rows
from deepspectra.rows.parameter_uses import Matrix
from deepspectra.rows.spectrum import Spectrum


@dataclass(frozen=True)
class KhatriRao:
    """How well products of means stand for means of products: h_c ⊗ e_c for g_c, h_c ⊗ e_{c,k} for g_{c,k}.

    And h̄ ⊗ e_k for the logit means: if every class has the same mean feature h̄, what is left of the mean gradients
    of a potential class k is the common feature times its mean error.

    Attributes:
        class_cosine: (C,) cosine between g_c and h_c ⊗ e_c; NaN for an absent class.
        class_error: (C,) ‖g_c − h_c ⊗ e_c‖ / ‖g_c‖.
        cross_cosine: (C, C) of the cells (c, k).
        cross_error: (C, C).
        logit_cosine: (C,) cosine between the logit mean g_k = Σ_{c≠k} w_{c,k} g_{c,k}/Σ w and h̄ ⊗ e_k.

    Source: Papyan 2020, JMLR 21:252, section 6, as a claim; the measurement is this library's.
    """

    class_cosine: Tensor
    class_error: Tensor
    cross_cosine: Tensor
    cross_error: Tensor
    logit_cosine: Tensor


def centred_spectrum(uses: list[Matrix], parts: Decomposition, averages: Averages, name: str) -> GramSpectrum:
    """Of Σ_t e_t (h_t − h̄)ᵀ, from the smaller of their second moment and their inner products.

    With grouped kernels h and h̄ are what enters an output's own group.
    """
    began = time.perf_counter()
    weight = counted(parts.rows)
    mean = _mixed_features(uses, (weight / weight.sum())[:, None])[0].mean(0)
    size, eps = uses[0].slice.numel, torch.finfo(parts.problem.dtype).eps
    spectrum = (
        Spectrum.of_moment(*moment_of_rows((_centred(use, mean) for use in uses), averages), eps)
        if size < len(averages.every)
        else Spectrum.of_gram(_centred_gram(uses, mean), averages, size, eps)
    )
    what = f"gradients of {name} with centred features"
    return spectrum_of(spectrum, began, parts.problem, what, size=size)


def _centred(use: Matrix, mean: Tensor) -> Tensor:
    """The rows themselves (B·J, o·d), in the order of the parameter."""
    errors = torch.unflatten(use.errors.sum(3).flatten(0, 1), 1, (use.groups, -1))  # Σ_t e_t, by group
    common = torch.einsum("rgo,gd->rgod", errors, mean.to(errors).view(use.groups, -1)).flatten(1, 2)
    return use.formed(slice(None)).flatten(0, 1) - (common.mT if use.slice.transposed else common).flatten(1)


def _centred_gram(uses: list[Matrix], mean: Tensor) -> Tensor:
    """Their inner products (R, R).

    With s = Σ_t e_t and q = Σ_t e_t (h_tᵀh̄) those of the gradients, less s qᵀ and its transpose, plus ‖h̄‖² s sᵀ.
    """
    pairs = [_summed(use, mean) for use in uses]
    s, q = (torch.cat([pair[j] for pair in pairs]).double() for j in range(2))
    gram = gram_of([[[use] for use in uses]])
    norms = mean.double().square().view(uses[0].groups, -1).sum(1)
    gram += (s * norms.repeat_interleave(s.shape[1] // len(norms))) @ s.T - s @ q.T - q @ s.T
    return gram


def _summed(use: Matrix, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t e_t and Σ_t e_t (h_tᵀ h̄), (B·J, o) each."""
    along = torch.unflatten((use.features() * mean), 2, (use.groups, -1)).sum(3)  # (B, T, groups)
    errors = torch.unflatten(use.errors, 2, (use.groups, -1))
    weighted = torch.einsum("bjgot,btg->bjgo", errors, along).flatten(2)
    return use.errors.sum(3).flatten(0, 1), weighted.flatten(0, 1)


def khatri_rao(uses: list[Matrix], parts: Decomposition, averages: Averages) -> KhatriRao:
    """Means of gradients against products of means of features and errors."""
    member = membership(parts.rows)
    features = _mixed_features(uses, member / positive(member.sum(0)))  # (C, T, d) class means
    num_classes = len(features)
    classes = torch.full((2, num_classes), torch.nan, dtype=torch.float64)  # cosines and errors
    cells = torch.full((2, num_classes, num_classes), torch.nan, dtype=torch.float64)
    by_class = parts.projections.by_class
    means = averages.every.view(-1, num_classes, num_classes)
    for c in torch.nonzero(parts.projections.class_weights > 0).flatten().tolist():
        other = [k for k in range(num_classes) if k != c]
        columns = torch.cat([means[:, c] @ by_class[c, :, None], means[:, c, other]], 1)
        gradient, product = _pair(uses, columns, features[c])
        tiny, norms = torch.finfo(gradient.dtype).tiny, gradient.norm(dim=1)
        cosines = (gradient * product).sum(1) / (norms * product.norm(dim=1)).clamp_min(tiny)
        errors = (gradient - product).norm(dim=1) / norms.clamp_min(tiny)
        found = torch.stack([cosines, errors]).double().cpu()
        classes[:, c], cells[:, c, other] = found[:, 0], found[:, 1:]
    mean = torch.einsum("c,ctd->td", (member.sum(0) / member.sum()).to(features), features)
    logits = _logit_cosines(uses, mean, parts, means)
    return KhatriRao(classes[0], classes[1], cells[0], cells[1], logits)


def _logit_cosines(uses: list[Matrix], feature: Tensor, parts: Decomposition, means: Tensor) -> Tensor:
    """(C,) cosines between logit means and h̄ ⊗ e_k; `means` (R, C, C) are the columns of the cells' averages."""
    by_logit = parts.projections.by_logit
    found = torch.full((len(by_logit),), torch.nan, dtype=torch.float64)
    for k in parts.projections.logit_weights.nonzero().flatten().tolist():
        column = means[:, :, k] @ by_logit[:, k, None].to(means)
        gradient, product = _pair(uses, column, feature)
        scale = gradient.norm() * product.norm()
        found[k] = float((gradient * product).sum() / scale.clamp_min(torch.finfo(gradient.dtype).tiny))
    return found


def _mixed_features(uses: list[Matrix], share: Tensor) -> Tensor:
    """Σ_i s_i h_i (r, T, d) for shares (N, r)."""
    shares = zip(torch.split(share, [use.num_examples for use in uses]), uses, strict=True)
    mixed = (torch.einsum("bc,btd->ctd", some.to(use.errors), use.features()) for some, use in shares)
    return functools.reduce(torch.add, mixed)


def _pair(uses: list[Matrix], columns: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """Σ α g and h ⊗ Σ α e for columns α (R, r) and a mean feature h (T, d): (r, o·d) each.

    An output of a grouped kernel has the features of its own group.
    """
    scalars, groups = uses[0].errors.shape[1], uses[0].groups
    gradient = feature.new_zeros(columns.shape[1], *uses[0].size)
    error = feature.new_zeros(columns.shape[1], *uses[0].errors.shape[2:])
    sizes = [use.num_examples * scalars for use in uses]
    for use, part in zip(uses, torch.split(columns, sizes), strict=True):
        mixed = part.view(use.num_examples, scalars, -1).to(use.errors)
        live = mixed.flatten(1).any(1).nonzero().flatten()
        if not len(live):
            continue
        combined = use.combined(mixed[live], live)
        gradient = gradient + use.gradients(combined, live)
        error = error + combined.sum(0)
    own = torch.unflatten(feature, 1, (groups, -1)).transpose(0, 1)  # (groups, T, d)
    return gradient.flatten(1), (torch.unflatten(error, 1, (groups, -1)) @ own).flatten(1)
