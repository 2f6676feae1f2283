"""Tiny models of Hugging Face's families with a few batches each, and their loss in float64 from beginning to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY, LABELS = 24, 3
Batch = dict[str, Tensor]
tf = pytest.importorskip("transformers")


def sentences(shape: tuple[int, int] = (3, 6), *, padded: bool = True) -> Batch:
    """Tokens, of which the last of the first sentence are padding, and themselves for labels."""
    tokens = torch.randint(0, VOCABULARY, shape)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    if padded:
        mask[0, -2:], labels[0, -2:] = 0, -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def bert() -> tuple[nn.Module, list[Batch]]:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, num_labels=LABELS, **sizes)
    labels = [torch.randint(0, LABELS, (3,)) for _ in range(2)]
    return tf.BertForSequenceClassification(config), [{**sentences(), "labels": y} for y in labels]


def masked_bert() -> tuple[nn.Module, list[Batch]]:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)
    batches = [sentences(), sentences()]
    for batch in batches:
        batch["labels"][torch.rand(batch["labels"].shape) > 0.5] = -100
    return tf.BertForMaskedLM(config), batches


def gpt2() -> tuple[nn.Module, list[Batch]]:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=4, n_layer=1, n_head=2, n_positions=8, **ends)
    return tf.GPT2LMHeadModel(config), [sentences(), sentences((2, 4), padded=False)]


def llama() -> tuple[nn.Module, list[Batch]]:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = tf.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8, num_key_value_heads=1, **sizes)
    return tf.LlamaForCausalLM(config), [sentences(), sentences((2, 4), padded=False)]


def mixtral() -> tuple[nn.Module, list[Batch]]:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=3, **sizes)
    return tf.MixtralForCausalLM(config), [sentences(), sentences((2, 4), padded=False)]


def answering() -> tuple[nn.Module, list[Batch]]:
    """Where an answer starts and where it ends; a position beyond the sentence is none."""
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)
    batches = [sentences(), sentences((2, 4), padded=False)]
    for batch in batches:
        length = batch.pop("labels").shape[1]
        batch["start_positions"] = torch.tensor([1, 2, length])[-len(batch["input_ids"]) :]
        batch["end_positions"] = torch.tensor([3, 2, length])[-len(batch["input_ids"]) :]
    return tf.BertForQuestionAnswering(config), batches


def vit() -> tuple[nn.Module, list[Batch]]:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = tf.ViTConfig(image_size=4, patch_size=2, num_labels=LABELS, **sizes)
    images = [torch.randn(3, 3, 4, 4) for _ in range(2)]
    labels = [torch.randint(0, LABELS, (3,)) for _ in range(2)]
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    return tf.ViTForImageClassification(config), batches


def t5() -> tuple[nn.Module, list[Batch]]:
    sizes = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    config = tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    batches = [sentences(), sentences()]
    for batch in batches:
        batch["labels"] = torch.randint(1, VOCABULARY, (3, 4))
        batch["labels"][1, 2:] = -100
    return tf.T5ForConditionalGeneration(config), batches


FAMILIES: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    family.__name__: family for family in (bert, masked_bert, answering, gpt2, llama, mixtral, vit, t5)
}
SHIFTED = ("gpt2", "llama", "mixtral")


def family(name: str) -> tuple[nn.Module, list[Batch]]:
    """A model in float64, away from its initialisation, and its batches."""
    torch.manual_seed(0)
    model, batches = FAMILIES[name]()
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    pick = {True: Tensor.double, False: Tensor.clone}
    return model, [{key: pick[x.is_floating_point()](x) for key, x in batch.items()} for batch in batches]


def counted(name: str, batch: Batch) -> int:
    """Labels of a batch that are not ignored."""
    if name == "answering":
        places = torch.stack([batch["start_positions"], batch["end_positions"]])
        return int((places < batch["input_ids"].shape[1]).sum())
    labels = batch["labels"][:, 1:] if name in SHIFTED else batch["labels"]
    return int((labels != -100).sum())


@contextlib.contextmanager
def casts_up_only() -> Iterator[None]:
    """Within this float64 stays float64, by other means than the library's."""
    single, to, softmax = Tensor.float, Tensor.to, nn.functional.softmax

    def up(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda x: x.double() if x.is_floating_point() else single(x))
        patch.setattr(Tensor, "to", lambda x, *a, **k: to(x, *map(up, a), **{n: up(v) for n, v in k.items()}))
        patch.setattr(nn.functional, "softmax", lambda *a, **k: softmax(*a, **{n: up(v) for n, v in k.items()}))
        yield


def own_loss(model: nn.Module, name: str, batches: list[Batch]) -> Callable[[dict[str, Tensor]], Tensor]:
    """The mean over all batches of the loss that the model gives, as a function of its parameters."""
    weights = [counted(name, batch) for batch in batches]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found = [torch.func.functional_call(model, parameters, (), batch).loss for batch in batches]
        return sum(w * one for w, one in zip(weights, found, strict=True)) / sum(weights)

    return loss
