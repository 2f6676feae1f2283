"""Every quantity by its definition: dense, float64, slow, and sharing no code with the library.

`Reference(case)` evaluates the network once on all batches in eval mode, keeps the graph, and differentiates
it row by row with `torch.autograd.grad`. Shapes: n predictions (examples, or tokens that are not ignored),
C outputs, P parameters in the order of `model.named_parameters()`, tied ones once, frozen ones left out.

Cross-entropy in torch's sense: the total loss is Σ_i ω_{y_i} ℓ_i / Σ_i ω_{y_i}. Its Hessian in the logits of
prediction i is s_i (diag p_i − p_i p_iᵀ) with a scale s_i that is 1/n in the plain case.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nets import CASES, Case


@cache
def case_and_reference(name: str) -> tuple[Case, Reference]:
    """A case of `nets.CASES` with its reference, made once a test run."""
    case = CASES[name]()
    return case, Reference(case)


class Reference:
    """The dense truth about a case, for all of its trainable parameters or those named."""

    def __init__(self, case: Case, names: Sequence[str] | None = None) -> None:
        self.case = case
        trainable = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
        self.parameters = trainable if names is None else {name: trainable[name] for name in names}
        self.num_parameters = sum(p.numel() for p in self.parameters.values())

    # ------------------------------------------------------------------------------------------ the network

    @cached_property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs (n, C), with their graph, and targets; ignored predictions left out."""
        case, mode = self.case, self.case.model.training
        case.model.eval()
        pieces = []
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            for batch in case.batches:
                z, y = case.forward(case.model, batch) if case.forward else (case.model(batch[0]), batch[1])
                if z.ndim == 3:  # (B, T, C), or (B, C, T) as functional.cross_entropy has it
                    z, y = (z if case.classes_last else z.movedim(1, 2)).flatten(0, 1), y.flatten()
                if not y.is_floating_point():
                    kept = y != self.ignored
                    z, y = z[kept], y[kept]
                pieces.append((z, y))
        case.model.train(mode)
        outputs, targets = zip(*pieces, strict=True)
        return torch.cat(outputs), torch.cat(targets)

    @property
    def ignored(self) -> int:
        return self.case.loss.ignore_index if isinstance(self.case.loss, nn.CrossEntropyLoss) else -100

    def total_loss(self, z: Tensor) -> Tensor:
        """The loss of all outputs (n, C) as one batch, by torch's own functions."""
        y, loss = self.outputs[1], self.case.loss
        if loss == "cross_entropy":
            return functional.cross_entropy(z, y)
        if loss == "mse":
            return functional.mse_loss(z, y)
        return loss(z, y)

    def _flat_gradient(self, scalar: Tensor, create_graph: bool = False) -> Tensor:
        """Gradient (P,) of a scalar; zero where it does not depend on a parameter."""
        if not scalar.requires_grad:
            return torch.zeros(self.num_parameters, dtype=scalar.dtype)
        gradients = torch.autograd.grad(
            scalar,
            list(self.parameters.values()),
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return torch.cat([g.reshape(-1) for g in gradients])

    def _second_derivative(self, scalar: Tensor) -> Tensor:
        """Hessian (P, P) of a scalar by double backward, one row at a time."""
        gradient = self._flat_gradient(scalar, create_graph=True)
        return torch.stack([self._flat_gradient(entry) for entry in gradient])

    @cached_property
    def loss(self) -> float:
        return self.total_loss(self.outputs[0]).item()

    @cached_property
    def gradient(self) -> Tensor:
        return self._flat_gradient(self.total_loss(self.outputs[0]))

    @cached_property
    def jacobian(self) -> Tensor:
        """J (n, C, P): the derivative of each output with respect to the parameters."""
        z = self.outputs[0]
        rows = [self._flat_gradient(entry) for entry in z.reshape(-1)]
        return torch.stack(rows).reshape(*z.shape, -1)

    # --------------------------------------------------------------------------------------- the loss alone

    @cached_property
    def _detached(self) -> Tensor:
        return self.outputs[0].detach().requires_grad_()

    @cached_property
    def output_gradient(self) -> Tensor:
        """∂L/∂z (n, C) of the total loss L."""
        return torch.autograd.grad(self.total_loss(self._detached), self._detached)[0]

    @cached_property
    def output_hessian(self) -> Tensor:
        """∂²L/∂z² (n, C, C) of the total loss; between different predictions it is zero."""
        z = self._detached
        (gradient,) = torch.autograd.grad(self.total_loss(z), z, create_graph=True)
        rows = [torch.autograd.grad(entry, z, retain_graph=True)[0] for entry in gradient.reshape(-1)]
        full = torch.stack(rows).reshape(*z.shape, *z.shape)  # (n, C, n, C)
        blocks = torch.einsum("ikil->ikl", full)
        assert torch.isclose(full.abs().sum(), blocks.abs().sum()), "the loss couples predictions"
        return blocks

    # --------------------------------------------------------------------------------------------- matrices

    @cached_property
    def hessian(self) -> Tensor:
        """∂²L/∂θ²."""
        return self._second_derivative(self.total_loss(self.outputs[0]))

    @cached_property
    def gauss_newton(self) -> Tensor:
        """G = Σ_i J_iᵀ (∂²L/∂z_i²) J_i, for any loss."""
        return torch.einsum("ikp,ikl,ilq->pq", self.jacobian, self.output_hessian, self.jacobian)

    @cached_property
    def residual(self) -> Tensor:
        """R = Σ_{i,k} (∂L/∂z_{ik}) ∂²z_{ik}/∂θ², not by subtraction."""
        return self._second_derivative((self.output_gradient * self.outputs[0]).sum())

    @cached_property
    def shares_of_rows(self) -> Tensor:
        """ω_i / Σ ω (n,): 1/n, or the class weight of each label over their sum."""
        loss, y = self.case.loss, self.outputs[1]
        if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
            return loss.weight[y] / loss.weight[y].sum()
        return torch.full((len(y),), 1 / len(y), dtype=self.outputs[0].dtype)

    @cached_property
    def empirical_fisher(self) -> Tensor:
        """Σ_i (ω_i / Σ ω) g_i g_iᵀ with g_i the gradient of ℓ_i, so that L = Σ_i (ω_i / Σ ω) ℓ_i."""
        gradients = torch.einsum("ik,ikp->ip", self.output_gradient, self.jacobian)
        gradients = gradients / self.shares_of_rows[:, None]
        return torch.einsum("i,ip,iq->pq", self.shares_of_rows, gradients, gradients)

    def block(self, matrix: Tensor, *globs: str) -> Tensor:
        """Rows and columns of the parameters whose name matches one of the globs."""
        keep = torch.cat(
            [
                torch.full((p.numel(),), any(fnmatchcase(name, glob) for glob in globs))
                for name, p in self.parameters.items()
            ]
        )
        return matrix[keep][:, keep]

    # ------------------------------------------------------------- rows g_{i,k} and the parts of G (softmax)

    @property
    def labels(self) -> Tensor:
        return self.outputs[1]

    @property
    def num_classes(self) -> int:
        return self.outputs[0].shape[1]

    @cached_property
    def probabilities(self) -> Tensor:
        return self.outputs[0].detach().softmax(1)

    @cached_property
    def scales(self) -> Tensor:
        """s_i (n,) with ∂²L/∂z_i² = s_i (diag p_i − p_i p_iᵀ): 1/n in the plain case."""
        loss, y = self.case.loss, self.labels
        module = loss if isinstance(loss, nn.CrossEntropyLoss) else nn.CrossEntropyLoss()
        weight = torch.ones(self.num_classes) if module.weight is None else module.weight
        weight, smoothing = weight.to(self.probabilities), module.label_smoothing
        scale = (1 - smoothing) * weight[y] + smoothing / self.num_classes * weight.sum()
        return scale / weight[y].sum()

    @cached_property
    def weights(self) -> Tensor:
        """w_{i,k} = s_i p_{i,k} (n, C)."""
        return self.scales[:, None] * self.probabilities

    @cached_property
    def gradients(self) -> Tensor:
        """g_{i,k} = J_iᵀ (p_i − y_k) (n, C, P)."""
        errors = self.probabilities[:, None, :] - torch.eye(self.num_classes).to(self.probabilities)
        return torch.einsum("ikl,ilp->ikp", errors, self.jacobian)

    @cached_property
    def rows(self) -> Tensor:
        """A (nC, P) with rows √w_{i,k} g_{i,k}: G = AᵀA."""
        return (self.weights.sqrt()[..., None] * self.gradients).flatten(0, 1)

    @cached_property
    def projections(self) -> dict[str, Tensor]:
        """The projections Π (nC, nC) in sample space: class, cross, logit, interaction, within, true."""
        return projections(self.weights, self.labels)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """AᵀΠA (P, P) for each projection."""
        return {name: self.rows.T @ p @ self.rows for name, p in self.projections.items()}

    @cached_property
    def parts_by_means(self) -> dict[str, Tensor]:
        """The published four parts by the formulas with means, which know nothing of projections."""
        C, P = self.num_classes, self.num_parameters
        parts = {name: self.rows.new_zeros(P, P) for name in ("class", "cross", "within", "true")}
        w_c, g_c, w_ck, g_ck = self.means
        for c in range(C):
            parts["class"] += w_c[c] * torch.outer(g_c[c], g_c[c])
            parts["true"] += w_ck[c, c] * torch.outer(g_ck[c, c], g_ck[c, c])
            for k in range(C):
                between = g_ck[c, k] - g_c[c]
                if k != c:
                    parts["cross"] += w_ck[c, k] * torch.outer(between, between)
                for i in (self.labels == c).nonzero().flatten():
                    inside = self.gradients[i, k] - g_ck[c, k]
                    parts["within"] += self.weights[i, k] * torch.outer(inside, inside)
        return parts

    @cached_property
    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w_c (C,), g_c (C, P), w_{c,k} (C, C), g_{c,k} (C, C, P); zero for a class that does not occur."""
        C = self.num_classes
        w_ck, sums = self.weights.new_zeros(C, C), self.gradients.new_zeros(C, C, self.num_parameters)
        for c in range(C):
            inside = self.labels == c
            for k in range(C):
                w_ck[c, k] = self.weights[inside, k].sum()
                sums[c, k] = (self.weights[inside, k, None] * self.gradients[inside, k]).sum(0)
        off = 1 - torch.eye(C).to(w_ck)
        w_c, sum_c = (w_ck * off).sum(1), (sums * off[..., None]).sum(1)
        return w_c, _divide(sum_c, w_c), w_ck, _divide(sums, w_ck)


def _divide(sums: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights[..., None] > 0, sums / weights[..., None], 0.0)


def projections(weights: Tensor, labels: Tensor, groups: Tensor | None = None) -> dict[str, Tensor]:
    """The orthogonal projections in R^{nC} for weights w_{i,k} (n, C) and true classes (n,), or their groups (C,).

    "logit" and "interaction" are "cross" in two, with the classes taken out first; "logit_first" is the
    logits' projection before the classes are taken out, and "class_second" the classes' after the logits.
    """
    n, C = weights.shape
    entry = weights.sqrt()
    groups = torch.arange(C) if groups is None else groups
    true_class = groups[labels][:, None].expand(n, C)
    potential = groups.expand(n, C)
    size, C = n * C, int(groups.max()) + 1

    def unit(mask: Tensor) -> Tensor:
        vector = (entry * mask).flatten()
        return vector / vector.norm() if vector.norm() > 0 else vector

    b_c = [unit((true_class == c) & (potential != c)) for c in range(C)]
    b_cc = [unit((true_class == c) & (potential == c)) for c in range(C)]
    b_ck = [unit((true_class == c) & (potential == k)) for c in range(C) for k in range(C) if k != c]
    b_k = [unit((true_class != k) & (potential == k)) for k in range(C)]

    on_class, on_true, on_pairs, on_logits = (onto(torch.stack(b, 1)) for b in (b_c, b_cc, b_ck, b_k))
    additive = onto(torch.stack(b_c + b_k, 1))
    return {
        "class": on_class,
        "cross": on_pairs - on_class,
        "logit": additive - on_class,
        "interaction": on_pairs - additive,
        "within": torch.eye(size).to(weights) - on_pairs - on_true,
        "true": on_true,
        "logit_first": on_logits,
        "class_second": additive - on_logits,
    }


GONE = {  # what is named in a knock-out → what is gone then; class comes before logit
    "class": ("class", "true"),
    "logit": ("logit",),
    "class + logit": ("class", "logit", "true"),
    "interaction": ("interaction",),
    "cross": ("logit", "interaction"),
    "true": ("true",),
    "means": ("class", "logit", "interaction", "true"),
    "within": ("within",),
}


def without(matrix: Tensor, rows: Tensor, projection: Tensor, method: str = "subtraction") -> Tensor:
    """M − B, or (I − QQᵀ) M (I − QQᵀ) with Q a basis of B, for the part B = AᵀΠA of rows A."""
    factor = rows.T @ projection
    if method == "subtraction":
        return matrix - factor @ factor.T
    away = torch.eye(len(matrix)).to(matrix) - onto(factor, 1e-6)
    return away @ matrix @ away


def onto(columns: Tensor, rtol: float = 1e-10) -> Tensor:
    """The orthogonal projection on the span of the columns, their rank decided at `rtol` of the largest."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = u[:, s > rtol * s[0]] if s[0] > 0 else u[:, :0]
    return basis @ basis.T


def rank(matrix: Tensor, rtol: float = 1e-9) -> int:
    """Singular values above `rtol` of the largest."""
    s = torch.linalg.svdvals(matrix)
    return int((s > rtol * s[0]).sum())


def error(given: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry expected."""
    assert given.shape == expected.shape, f"shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    deviation = (given.to(expected) - expected).abs().max().item()
    return deviation / scale if scale > 0 else deviation


def inputs_and_errors(ref: Reference, module: nn.Module) -> tuple[Tensor, Tensor]:
    """H (n, D) and e_{i,k} (n, C, D') of a module, from hooks and backpropagation of single losses."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output.retain_grad()
        inputs.append(given[0].detach().flatten(1))
        outputs.append(output)
        return output.clone()

    handle = module.register_forward_hook(hook)
    fresh = Reference(ref.case)
    logits, _ = fresh.outputs
    handle.remove()
    rows = []
    for k in range(ref.num_classes):
        y = torch.full((len(logits),), k)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
        rows.append(torch.cat([gradient.flatten(1) for gradient in gradients]))
    return torch.cat(inputs), torch.stack(rows, 1)


def close(given: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Equal up to 1e-8 of what a part belongs to: a part may be all but zero."""
    return bool((given - expected).abs().max() <= 1e-8 * scale.abs().max())


def descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)


def same_spectrum(found: Tensor, matrix: Tensor, scale: float) -> bool:
    """Whether values are the matrix's eigenvalues, up to zeros on either side, to 1e-10 of a scale."""
    expected = descending(matrix)
    size = max(len(found), len(expected))
    found, expected = (functional.pad(values, (0, size - len(values))).sort().values for values in (found, expected))
    return bool((found - expected).abs().max() <= 1e-10 * scale)


def projections_of(ref: Reference, groups: Tensor | None = None, first: str = "class") -> dict[str, Tensor]:
    """The projections of the two-way parts by groups, or with logit first."""
    on = projections(ref.weights, ref.labels, groups)
    second = {"class": "class_second", "logit": "logit_first"} if first == "logit" else {}
    return {part: on[second.get(part, part)] for part in ("class", "logit", "interaction", "within", "true")}


RTOL = 1e-10


def padded(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)))


def agrees(found: Tensor, matrix: Tensor, scale: float) -> bool:
    expected = descending(matrix)
    size = max(len(found), len(expected))
    difference = padded(found, size).sort().values - padded(expected, size).sort().values
    return bool(difference.abs().max() <= RTOL * scale)
