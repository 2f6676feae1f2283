"""A small transformer over the patches of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspectra.errors import OptionError, ShapeError
from deepspectra.zoo.convolutional import image_shape


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a GELU layer of four times the width, each on a normalised input and added to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """An encoder over the patches of an image, mean-pooled."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self.patch = patch
        self.embed = nn.Linear(channels * patch[0] * patch[1], width)
        self.position = nn.Parameter(torch.empty((height // patch[0]) * (breadth // patch[1]), width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        (batch, channels, height, breadth), (rows, columns) = x.shape, self.patch
        x = x.reshape(batch, channels, height // rows, rows, breadth // columns, columns)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C rows columns)
        x = self.blocks(self.embed(x) + self.position)  # (B, T, D)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]


def transformer(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    patch: tuple[int, int] | None = None,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
) -> nn.Module:
    """A small pre-norm transformer encoder that classifies images: LayerNorm, GELU, mean pooling.

    About 100,000 parameters. Attention is `scaled_dot_product_attention`, whose fused kernels have no second
    derivative: for Hessian products run it under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    Initial weights are PyTorch's; position embeddings are N(0, .02).

    Args:
        input_shape: (C, H, W).
        num_classes: number of logits.
        patch: (rows, columns) of one token's patch, dividing the image; ``(1, W)`` makes tokens of rows. By
            default the largest of 4, 2 and 1 pixels square that divides the image and leaves 16 tokens.
        width: features per token.
        depth: number of blocks.
        num_heads: attention heads, dividing `width`.

    Raises:
        ShapeError: the image has no (C, H, W) shape, or the patch does not divide it.
        OptionError: the heads do not divide the width.
    """
    channels, height, breadth = image_shape("transformer", input_shape, smallest=1)
    if patch is None:
        fits = (p for p in (4, 2) if height % p == breadth % p == 0 and height * breadth >= 16 * p * p)
        side = next(fits, 1)
        patch = (side, side)
    if min(patch) < 1 or height % patch[0] or breadth % patch[1]:
        raise ShapeError(f"Patches of {patch} do not divide images of {height} × {breadth}; change `patch`.")
    if num_heads < 1 or width % num_heads:
        raise OptionError(f"{num_heads} heads do not divide a width of {width}; change `num_heads`.")
    return Transformer(
        (channels, height, breadth), num_classes, patch=patch, width=width, depth=depth, num_heads=num_heads
    )
