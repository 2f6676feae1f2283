"""Products of features and errors are those of the gradients that they make, for every kind of use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deepspectra.rows.parameter_uses import (
    BLOCKS,
    LAYOUTS,
    Convolution,
    Layout,
    Lookup,
    Matrix,
    Slice,
    Use,
    Vectors,
    as_slice,
    joined,
)

B, J = 4, 3  # examples, and scalars of each


def settings(stride: int, groups: int) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    return [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups


INDEX = torch.tensor([[0, 2, 2], [1, 1, 4], [3, 0, 0], [2, 4, 1]])

# the use, its stretch of a parameter, what it is given, and the operation
KINDS = {
    "matrix": (
        Matrix,
        (5, 6),
        lambda: torch.randn(B, 2, 6),
        lambda w, x: functional.linear(x, w),
    ),
    "its transpose": (Matrix, (6, 5), lambda: torch.randn(B, 1, 6), lambda w, x: x @ w),
    "kernel": (
        lambda s, x: Convolution(s, x, settings(2, 1)),
        (4, 2, 3, 3),
        lambda: torch.randn(B, 2, 5, 5),
        lambda w, x: functional.conv2d(x, w, None, 2, 1),
    ),
    "grouped kernel": (
        lambda s, x: Convolution(s, x, settings(1, 2)),
        (4, 1, 3, 3),
        lambda: torch.randn(B, 2, 4, 4),
        lambda w, x: functional.conv2d(x, w, None, 1, 1, 1, 2),
    ),
    "table": (
        lambda s, x: Lookup(s, x, 4),
        (5, 3),
        lambda: INDEX,
        lambda w, x: functional.embedding(x, w, 4),
    ),
    "scale": (
        lambda s, x: Vectors(s, x[:, None], (1,)),
        (6,),
        lambda: torch.randn(B, 2, 6),
        lambda w, x: x * w,
    ),
}


def used(kind: str) -> tuple[Use, Tensor]:
    """A use with errors of J random scalars an example, and their gradients (B, J, numbers) by autograd."""
    make, shape, inputs, operation = KINDS[kind]
    torch.manual_seed(0)
    given = inputs()
    given = given.double() if given.is_floating_point() else given
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    use = make(Slice("w", 0, shape, kind == "its transpose"), given)
    if kind == "scale":
        use.num_examples = B
    else:
        use.arrange(BLOCKS, B)
    out = operation(w, given)
    expected = torch.zeros(B, J, w.numel(), dtype=torch.float64)
    for j in range(J):
        errors = torch.randn_like(out)
        use.put(j, J, errors[:, None])
        for i in range(B):
            (gradient,) = torch.autograd.grad((out[i] * errors[i]).sum(), w, retain_graph=True)
            expected[i, j] = gradient.flatten()
    return use, expected


@pytest.mark.parametrize("kind", KINDS)
def test_formed_gradients_are_those_of_autograd(kind: str) -> None:
    use, expected = used(kind)
    rows = use.slice.shape[0]
    whole = use.formed(slice(0, rows))
    torch.testing.assert_close(whole, expected, atol=1e-12, rtol=0)
    width = expected.shape[2] // rows
    some = use.formed(slice(1, 3))
    torch.testing.assert_close(some, expected[..., width : 3 * width], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_from_both_sides_are_those_with_the_gradients(kind: str) -> None:
    use, expected = used(kind)
    tangents = torch.randn(2, *use.slice.shape, dtype=torch.float64)
    scalars = torch.einsum("bjp,kp->bjk", expected, tangents.flatten(1))
    torch.testing.assert_close(use.push(tangents), scalars, atol=1e-11, rtol=0)
    mixed, chosen = torch.randn(2, J, 2, dtype=torch.float64), torch.tensor([1, 3])
    pulled = torch.einsum("bjk,bjp->kp", mixed, expected[chosen])
    torch.testing.assert_close(use.pull(mixed, chosen).flatten(1), pulled, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", ["matrix", "its transpose", "kernel", "table"])
def test_inner_products_of_gradients_need_no_gradients(kind: str) -> None:
    use, expected = used(kind)
    flat = expected.flatten(0, 1)
    found = type(use).inner(use.factors(), use.factors())  # type: ignore[attr-defined]
    torch.testing.assert_close(found, flat @ flat.T, atol=1e-10, rtol=0)


def test_uses_of_some_examples_after_those_of_others_are_one() -> None:
    first, expected = used("matrix")
    second, _ = used("matrix")
    (both,) = joined([[first], [second]]) or [None]
    assert both is not None
    assert both.num_examples == 2 * B
    torch.testing.assert_close(both.formed(slice(0, 5)), torch.cat([expected, expected]), atol=1e-12, rtol=0)
    other, _ = used("table")
    assert joined([[first], [other]]) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_examples_come_first_wherever_they_were(layout: Layout) -> None:
    own = torch.arange(B * 2 * 3).view(B, 2, 3)  # of each example, 2 × 3 numbers
    laid = {
        "blocks": own.reshape(2 * B, 3),
        "interleaved": own.transpose(0, 1).reshape(2 * B, 3),
        "second": own.transpose(0, 1),
    }[layout.kind]
    assert layout.divides(laid, B)
    assert torch.equal(layout.examples_first(laid, B).reshape(B, 2, 3), own)
    codes = torch.tensor([2.0, 3.0, 5.0, 7.0])
    errors = laid.double() + 1
    scale = {"blocks": codes.repeat_interleave(2)[:, None], "interleaved": codes.repeat(2)[:, None]}.get(
        layout.kind, codes[:, None]
    )
    assert layout.fits(errors, errors * scale, codes, 1e-9)
    assert not layout.fits(errors, errors * scale.flip(0), codes, 1e-9)


@pytest.mark.parametrize("kind", ["matrix", "scale"])
def test_what_is_not_needed_after_the_errors_is_let_go(kind: str) -> None:
    """A matrix needs its features as long as it is held; of scales the errors have all that is needed."""
    use, _ = used(kind)
    size = use.errors.numel() * 8
    assert (use.given is None) == (kind == "scale")
    assert use.num_bytes == size + (use.given.numel() * 8 if use.given is not None else 0)


def test_another_order_is_one_that_a_tensor_can_have_and_that_is_told_apart() -> None:
    blocks, interleaved, second = LAYOUTS
    assert not second.divides(torch.ones(B), B)
    assert second.divides(torch.ones(3, B), B)
    assert not blocks.divides(torch.ones(B + 1, 2), B)
    assert blocks.divides(None, B)
    assert interleaved.differs(torch.ones(2 * B, 3), B)
    assert not interleaved.differs(torch.ones(B, 3), B), "one row an example lies in one order only"


def test_indices_without_a_gap_are_a_slice() -> None:
    assert as_slice(torch.tensor([2, 3, 4])) == slice(2, 5)
    gap = torch.tensor([2, 4])
    assert as_slice(gap) is gap
