"""Tiny problems, one a difficulty: P up to about 800, up to 40 predictions, 3 to 5 classes, float64.

A `Case` is a model, a list of batches and a loss, as a user would give them. `CASES` names a builder for
each; builders take a dtype and make everything anew, from a seed of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import zoo
from deepspectra.rows.held_rows import HeldRows


@dataclass
class Case:
    """A model, its data as a list of batches, and its loss."""

    model: nn.Module
    batches: list[Any]
    loss: Any = "cross_entropy"
    forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None
    classes_last: bool = False  # outputs (B, T, C) rather than (B, C, T)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All inputs and all targets, each as one tensor (for batches that are pairs)."""
        inputs, targets = zip(*self.batches, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def problem(self, data: Any = None, **options: Any) -> Any:
        """The library's `Problem` for this case, on other data or with other options if given."""
        if self.forward is not None:
            options.setdefault("forward", self.forward)
        return ds.Problem(self.model, self.batches if data is None else data, loss=self.loss, **options)


def chunks(x: Tensor, y: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Cut (x, y) into batches of these sizes, which must use up every example."""
    assert sum(sizes) == len(x) == len(y)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def labels(num: int, num_classes: int) -> Tensor:
    """Random labels in which every class occurs."""
    return torch.cat([torch.arange(num_classes), torch.randint(num_classes, (num - num_classes,))])


# ---------------------------------------------------------------------------------------------- regression


def linear_regression(dtype: torch.dtype = torch.float64) -> Case:
    """Mean squared error of a linear map: the Hessian is (2/D) I ⊗ E[(x,1)(x,1)ᵀ], the residual is zero."""
    torch.manual_seed(1)
    x, y = torch.randn(12, 4, dtype=dtype), torch.randn(12, 3, dtype=dtype)
    return Case(nn.Linear(4, 3).to(dtype), chunks(x, y, [5, 5, 2]), loss="mse")


def mse_module(dtype: torch.dtype = torch.float64) -> Case:
    """`nn.MSELoss` on a tanh network with two outputs, over unequal batches."""
    torch.manual_seed(2)
    x, y = torch.randn(13, 4, dtype=dtype), torch.randn(13, 2, dtype=dtype)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    return Case(model, chunks(x, y, [6, 6, 1]), loss=nn.MSELoss())


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    """A mean loss that no library knows; its curvature depends on the target and couples outputs."""
    one_hot = functional.one_hot(target, output.shape[1]).to(output)
    error = output - one_hot
    return (torch.log(torch.cosh(error)).sum(1) + 0.1 * error.sum(1) ** 2).mean()


def callable_loss(dtype: torch.dtype = torch.float64) -> Case:
    """A loss given as a function of output and target, over unequal batches."""
    torch.manual_seed(3)
    x, y = torch.randn(14, 5, dtype=dtype), labels(14, 3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return Case(model, chunks(x, y, [6, 5, 3]), loss=log_cosh)


def binary_targets(dtype: torch.dtype = torch.float64) -> Case:
    """`nn.BCEWithLogitsLoss` on multi-label targets: a mean over examples and outputs."""
    torch.manual_seed(4)
    x, y = torch.randn(11, 4, dtype=dtype), torch.randint(2, (11, 3)).to(dtype)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return Case(model, chunks(x, y, [4, 4, 3]), loss=nn.BCEWithLogitsLoss())


def soft_targets(dtype: torch.dtype = torch.float64) -> Case:
    """Cross-entropy with class probabilities for targets."""
    torch.manual_seed(5)
    x, y = torch.randn(12, 4, dtype=dtype), torch.randn(12, 3, dtype=dtype).softmax(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return Case(model, chunks(x, y, [7, 3, 2]))


# ------------------------------------------------------------------------------------------ classification


def softmax_regression(dtype: torch.dtype = torch.float64) -> Case:
    """A linear map and cross-entropy: the Hessian is G = E[(diag p − ppᵀ) ⊗ (x,1)(x,1)ᵀ]."""
    torch.manual_seed(10)
    x, y = torch.randn(15, 5, dtype=dtype), labels(15, 3)
    return Case(nn.Linear(5, 3).to(dtype), chunks(x, y, [5, 5, 5]))


def relu_mlp(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(11)
    x, y = torch.randn(20, 6, dtype=dtype), labels(20, 4)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)).to(dtype)
    return Case(model, chunks(x, y, [10, 10]))


def ragged(dtype: torch.dtype = torch.float64) -> Case:
    """A list of batches of very different sizes: a mean of batch means would be far off."""
    torch.manual_seed(12)
    x, y = torch.randn(17, 5, dtype=dtype), labels(17, 3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return Case(model, chunks(3.0 * x, y, [1, 9, 2, 5]))


def conv_pool(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(13)
    x, y = torch.randn(12, 1, 6, 6, dtype=dtype), labels(12, 3)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return Case(model.to(dtype), chunks(x, y, [7, 5]))


def conv_batchnorm(dtype: torch.dtype = torch.float64) -> Case:
    """Batch norm in eval mode, its running statistics and affine weights far from 0 and 1."""
    torch.manual_seed(14)
    x, y = torch.randn(12, 2, 5, 5, dtype=dtype), labels(12, 4)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.running_mean.normal_(0.5, 1.0)
        norm.running_var.uniform_(0.3, 2.5)
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).to(dtype)
    return Case(model.eval(), chunks(x, y, [4, 4, 4]))


class TiedParameter(nn.Module):
    """One Parameter used twice, the second time transposed, and a temperature of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4))
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(x, self.weight)), self.weight.T) * self.temperature


def group_norm(dtype: torch.dtype = torch.float64) -> Case:
    """Group norm, whose second derivatives PyTorch mixes up when several vectors go through one graph."""
    torch.manual_seed(20)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).to(dtype)
    x, y = torch.randn(8, 1, 5, 5, dtype=dtype), labels(8, 3)
    return Case(model, chunks(x, y, (4, 3, 1)))


def tied_parameter(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(15)
    x, y = torch.randn(13, 4, dtype=dtype), labels(13, 4)
    return Case(TiedParameter().to(dtype), chunks(x, y, [8, 5]))


class TiedModules(nn.Module):
    """A language model's usual tie: the output layer has the embedding's weight. Logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.hidden = nn.Linear(6, 6)
        self.output = nn.Linear(6, 5)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))))


def tied_modules(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(16)
    tokens = torch.randint(5, (6, 4))
    return Case(TiedModules().to(dtype), chunks(tokens, tokens.roll(-1, 1), [4, 2]), forward=flat_tokens)


class ReusedModule(nn.Module):
    """One linear layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.outer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def reused_module(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(17)
    x, y = torch.randn(12, 5, dtype=dtype), labels(12, 3)
    return Case(ReusedModule().to(dtype), chunks(x, y, [6, 6]))


def layernorm_gelu(dtype: torch.dtype = torch.float64) -> Case:
    """Layer norm, through which a reverse-mode Jacobian differentiated again is wrong by 10 to 20 %."""
    torch.manual_seed(18)
    x, y = torch.randn(14, 5, dtype=dtype), labels(14, 4)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.4 * torch.randn(len(parameter)))
    return Case(model.to(dtype), chunks(x, y, [5, 5, 4]))


class ModuleBlock(nn.Module):
    """A pre-norm transformer block on `nn.MultiheadAttention`, mean-pooled into class logits."""

    def __init__(self, width: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def attention_module(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(19)
    x, y = torch.randn(10, 4, 4, dtype=dtype), labels(10, 3)
    return Case(ModuleBlock().to(dtype), chunks(x, y, [6, 4]))


class CausalBlock(nn.Module):
    """A causal transformer block on `functional.scaled_dot_product_attention`. Logits (B, T, V)."""

    def __init__(self, width: int = 4, num_tokens: int = 5, length: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.position = nn.Parameter(0.3 * torch.randn(length, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, num_tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]  # (B, T, D)
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D/H)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm2(x)))


def attention_function(dtype: torch.dtype = torch.float64) -> Case:
    """Next-token prediction whose padding has the label −100, as language models mark it."""
    torch.manual_seed(20)
    tokens = torch.randint(5, (8, 4))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    targets[2, 2:] = -100
    targets[5, 1:] = -100
    return Case(CausalBlock().to(dtype), chunks(tokens, targets, [3, 1, 4]), classes_last=True)


class LanguageModel(nn.Module):
    """The same block as models of language libraries are called: by names, with the loss among what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.block = CausalBlock(num_tokens=4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.block(input_ids)
        shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": functional.cross_entropy(*shifted), "logits": logits}


def language_model(dtype: torch.dtype = torch.float64) -> Case:
    """Next-token prediction over dictionaries of sentences of unequal lengths, one of them padded."""
    torch.manual_seed(36)
    batches = []
    for num, length in ((2, 4), (3, 3), (1, 4)):
        tokens = torch.randint(4, (num, length))
        answers = tokens.clone()
        answers[0, -1] = -100
        batches.append({"input_ids": tokens, "labels": answers})
    return Case(LanguageModel().to(dtype), batches)


def flat_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and targets (B, T) as one row a token."""
    return model(batch[0]).flatten(0, 1), batch[1].flatten()


class TokenClassifier(nn.Module):
    """Embedding and a linear layer; logits (B, V, T), the layout `functional.cross_entropy` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens))).movedim(-1, 1)


def token_classes(dtype: torch.dtype = torch.float64) -> Case:
    """Token-level classes in torch's layout (B, V, T), with `ignore_index` and unequal counts kept."""
    torch.manual_seed(21)
    tokens, targets = torch.randint(6, (8, 4)), torch.randint(3, (8, 4))
    targets[0, 1:] = 9
    targets[3, :2] = 9
    targets[6] = 9
    return Case(
        TokenClassifier().to(dtype),
        chunks(tokens, targets, [2, 5, 1]),
        loss=nn.CrossEntropyLoss(ignore_index=9),
    )


class Unused(nn.Module):
    """A layer that the forward pass leaves out, between two that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.unused = nn.Linear(3, 2)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def unused_parameter(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(22)
    x, y = torch.randn(11, 4, dtype=dtype), labels(11, 3)
    return Case(Unused().to(dtype), chunks(x, y, [6, 5]))


def frozen_parameter(dtype: torch.dtype = torch.float64) -> Case:
    """The middle layer's weight and the first layer's bias do not train."""
    torch.manual_seed(23)
    x, y = torch.randn(12, 4, dtype=dtype), labels(12, 3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return Case(model, chunks(x, y, [6, 6]))


class Exponential(nn.Module):
    """A weight that is the exponential of what trains."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


def reparametrised(dtype: torch.dtype = torch.float64) -> Case:
    """A weight computed from another by `torch.nn.utils.parametrize`."""
    torch.manual_seed(25)
    x, y = torch.randn(10, 4, dtype=dtype), labels(10, 3)
    inner = nn.utils.parametrize.register_parametrization(nn.Linear(4, 5), "weight", Exponential())
    return Case(nn.Sequential(inner, nn.Tanh(), nn.Linear(5, 3)).to(dtype), chunks(x, y, [6, 4]))


def recurrent(dtype: torch.dtype = torch.float64) -> Case:
    """A recurrent network, whose kernels not every way of differentiating knows."""
    torch.manual_seed(24)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    x, y = torch.randn(9, 4, 3, dtype=dtype), labels(9, 3)
    return Case(Recurrent().to(dtype), chunks(x, y, [5, 4]))


# ------------------------------------------------------------------------------------- labels, weights, data


def _mlp(dtype: torch.dtype, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, num_classes)).to(dtype)


def unbalanced(dtype: torch.dtype = torch.float64) -> Case:
    """Class sizes 14, 5, 2 and 1, sorted by class so that batches hold few classes each."""
    torch.manual_seed(30)
    x, y = torch.randn(22, 5, dtype=dtype), torch.arange(4).repeat_interleave(torch.tensor([14, 5, 2, 1]))
    return Case(_mlp(dtype, 4), chunks(x, y, [8, 8, 6]))


def absent_class(dtype: torch.dtype = torch.float64) -> Case:
    """Four logits, but the label 2 never occurs."""
    torch.manual_seed(31)
    x, y = torch.randn(16, 5, dtype=dtype), torch.tensor([0, 1, 3]).repeat(6)[:16]
    return Case(_mlp(dtype, 4), chunks(x, y, [7, 7, 2]))


def class_weights(dtype: torch.dtype = torch.float64) -> Case:
    """Weighted classes over unequal batches: the mean is Σ w ℓ / Σ w over all the data."""
    torch.manual_seed(32)
    x, y = torch.randn(18, 5, dtype=dtype), labels(18, 3)
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=dtype)
    return Case(_mlp(dtype, 3), chunks(x, y, [3, 10, 5]), loss=nn.CrossEntropyLoss(weight=weight))


def label_smoothing(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(33)
    x, y = torch.randn(14, 5, dtype=dtype), labels(14, 4)
    return Case(_mlp(dtype, 4), chunks(x, y, [9, 5]), loss=nn.CrossEntropyLoss(label_smoothing=0.2))


def every_option(dtype: torch.dtype = torch.float64) -> Case:
    """Class weights, label smoothing and an ignored label together, over unequal batches."""
    torch.manual_seed(34)
    x, y = torch.randn(18, 5, dtype=dtype), labels(18, 3)
    y[[2, 3, 4, 11]] = -7
    weight = torch.tensor([0.5, 3.0, 1.5], dtype=dtype)
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, ignore_index=-7)
    return Case(_mlp(dtype, 3), chunks(x, y, [5, 2, 11]), loss=loss)


def dict_batches(dtype: torch.dtype = torch.float64) -> Case:
    """Batches as dictionaries, read by the user's own `forward`."""
    torch.manual_seed(35)
    x, y = torch.randn(13, 5, dtype=dtype), labels(13, 3)
    batches = [{"inputs": a, "labels": b, "note": "kept"} for a, b in chunks(x, y, [6, 6, 1])]
    return Case(_mlp(dtype, 3), batches, forward=read_dict)


def read_dict(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and targets of a dictionary batch."""
    return model(batch["inputs"]), batch["labels"]


UNLABELLED = {
    builder.__name__: builder
    for builder in (linear_regression, mse_module, callable_loss, binary_targets, soft_targets)
}


CLASSIFICATION = {
    builder.__name__: builder
    for builder in (
        softmax_regression,
        relu_mlp,
        ragged,
        conv_pool,
        conv_batchnorm,
        group_norm,
        tied_parameter,
        tied_modules,
        reused_module,
        layernorm_gelu,
        attention_module,
        attention_function,
        token_classes,
        unused_parameter,
        frozen_parameter,
        reparametrised,
        recurrent,
        unbalanced,
        absent_class,
        class_weights,
        label_smoothing,
        every_option,
        dict_batches,
    )
}


CASES = UNLABELLED | CLASSIFICATION


@functools.cache
def _trained_on_digits(
    per_class: int | None, widths: tuple[int, ...], epochs: int, rate: float, batch: int, seed: int
) -> tuple[nn.Module, zoo.LabelledData]:
    data = zoo.load("digits", per_class=per_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = zoo.mlp((1, 8, 8), 10, widths=widths)
    zoo.train(net, data, epochs=epochs, learning_rate=rate, batch_size=batch)
    return net, data


def trained_on_digits(
    per_class: int | None,
    widths: tuple[int, ...],
    *,
    epochs: int,
    rate: float = 0.1,
    batch: int = 16,
    seed: int = 0,
) -> tuple[nn.Module, zoo.LabelledData]:
    """A perceptron, trained once a process, and its digits; the global random state stays as it is."""
    net, data = _trained_on_digits(per_class, widths, epochs, rate, batch, seed)
    return copy.deepcopy(net), data


def classified(num: int = 60, activation: nn.Module | None = None, **options: Any) -> ds.Problem:
    """Points at random in three classes, and an untrained perceptron."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), activation or nn.Tanh(), nn.Linear(8, 3))
    return ds.Problem(net, (torch.randn(num, 5, generator=generator), torch.arange(num) % 3), **options)


def tied_tokens() -> ds.Problem:
    """Sentences whose table of embeddings is the weight of the output as well: it has no Kronecker factors."""
    torch.manual_seed(0)
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    tokens = torch.randint(0, 6, (10, 5))
    return ds.Problem(nn.Sequential(table, nn.Linear(4, 4), nn.Tanh(), head), (tokens, tokens))


def digits_problem() -> ds.Problem:
    """A network that has learned all the digits, in float64."""
    net, data = trained_on_digits(None, (32, 32), epochs=15, batch=32)
    return ds.Problem(net.double(), (data.inputs.double(), data.targets), batch_size=400)


OPERATORS = {
    "hessian": ds.Hessian,
    "gauss_newton": ds.GaussNewton,
    "residual": ds.Residual,
    "empirical_fisher": ds.EmpiricalFisher,
}


CENTRAL = ["unbalanced", "absent_class", "ragged", "every_option", "token_classes"]


def held(problem: ds.Problem) -> HeldRows:
    rows = HeldRows(problem)
    assert rows.captures.hold()
    return rows


def clustered() -> Case:
    """Well separated classes, a network that has begun to learn them: outliers stand clear of the bulk."""
    torch.manual_seed(40)
    y = torch.arange(40) % 4
    x = 2.5 * torch.eye(4, 6, dtype=torch.float64)[y] + 0.5 * torch.randn(40, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Case(model, [(x, y)])


def block_of(K: ds.Kronecker, matrix: Tensor, name: str) -> Tensor:
    """Rows and columns of a block, in its own order."""
    index = K.index[name]
    return matrix[index[:, None], index]
