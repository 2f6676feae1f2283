"""Training: the update rule, reproducibility, divergence; checkpoints that fit or say why not."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from torch import nn

from deepspectra.errors import DataError, FileError, NonFiniteError, OptionError
from deepspectra.zoo import (
    DATA_NAMES,
    MODEL_NAMES,
    History,
    LabelledData,
    accuracy,
    build,
    load,
    load_checkpoint,
    mlp,
    recipe,
    save_checkpoint,
    train,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits", per_class=10)


def small(seed=0, name="mlp-bn"):
    return build(name, input_shape=(1, 8, 8), num_classes=10, seed=seed)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- training


def test_settings_by_name_are_those_of_a_recipe(digits):
    how = dataclasses.replace(recipe("mlp-bn", "digits", len(digits)), epochs=2)
    nets = [small() for _ in range(3)]
    histories = [
        train(nets[0], digits, how),
        train(nets[1], digits, **dataclasses.asdict(how)),
        train(nets[2], digits, dataclasses.replace(how, epochs=9), epochs=2),
    ]
    assert histories[0] == histories[1] == histories[2]
    assert same_state(nets[0], nets[1])
    assert same_state(nets[0], nets[2])


def test_the_steps_are_those_of_sgd_with_momentum_and_weight_decay():
    # Softmax regression on one full batch, by hand in double precision.
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 4)), np.array([0, 1, 2, 0, 1, 2])
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    data = LabelledData(torch.from_numpy(x), torch.from_numpy(y), ("a", "b", "c"), "made", "train")
    history = train(model, data, epochs=6, learning_rate=0.3, momentum=0.8, weight_decay=0.01)

    weight, velocity, losses = np.zeros((3, 4)), np.zeros((3, 4)), []
    for epoch in range(6):
        logits = x @ weight.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(6), y]).mean())
        velocity = 0.8 * velocity + (p - np.eye(3)[y]).T @ x / 6 + 0.01 * weight
        weight = weight - 0.3 * (1, 1, 0.1, 0.1, 0.01, 0.01)[epoch] * velocity
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(history.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(history.learning_rates, [0.3, 0.3, 0.03, 0.03, 0.003, 0.003], rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp-bn", "lenet", "transformer"])
def test_a_seed_fixes_the_run_bit_for_bit(digits, name):
    def run(seed):
        model = small(name=name)
        return model, train(model, digits, epochs=2, learning_rate=0.05, batch_size=16, seed=seed)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    (first, history), (second, again), (other, _) = run(0), run(0), run(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(first, second)
    assert history == again
    assert not same_state(first, other)


def test_every_example_is_visited_once_an_epoch(digits):
    seen = []
    model = small(name="mlp")
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train(model, digits, epochs=1, learning_rate=0.01, batch_size=33)
    assert [len(x) for x in seen] == [33, 33, 34]  # the single example left joins the last batch
    assert torch.equal(torch.cat(seen).flatten(1).sort(0).values, digits.inputs.flatten(1).sort(0).values)


def test_progress_sees_the_model_after_each_epoch_and_the_model_ends_in_eval_mode(digits):
    model = small()
    seen = []
    history = train(
        model,
        digits,
        epochs=3,
        learning_rate=0.05,
        progress=lambda so_far: seen.append((len(so_far), model.training)),
    )
    assert seen == [(1, False), (2, False), (3, False)]
    assert len(history) == 3
    assert not model.training
    assert train(model, digits, epochs=0, learning_rate=0.05) == History()


def test_the_digits_are_learnt_by_the_recipe():
    data = load("digits", per_class=20)
    chosen = recipe("mlp", "digits", len(data))
    model = small(name="mlp")
    train(model, data, **dataclasses.asdict(chosen))
    assert accuracy(model, data) == 1
    assert accuracy(model, load("digits", split="test")) > 0.85


def test_a_diverging_run_stops_and_says_so(digits):
    model = small(name="mlp")
    with pytest.raises(NonFiniteError, match=r"in epoch \d+ at learning rate 1e\+06; lower it"):
        train(model, digits, epochs=20, learning_rate=1e6)
    assert not model.training


def test_accuracy_is_the_share_of_right_answers_and_keeps_the_mode():
    inputs = torch.eye(5).reshape(5, 1, 1, 5)
    data = LabelledData(inputs, torch.tensor([0, 1, 2, 3, 0]), tuple("abcde"), "made", "test")
    model = nn.Flatten().train()
    assert accuracy(model, data, batch_size=2) == pytest.approx(0.8)
    assert model.training


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("data", DATA_NAMES)
def test_every_pair_has_a_recipe(model, data):
    whole, part = recipe(model, data), recipe(model, data, 130)
    assert whole.epochs > 0
    assert part.batch_size < whole.batch_size
    assert part.learning_rate <= whole.learning_rate


@pytest.mark.parametrize("num_examples", [2, 30, 95, 130, 702, 999, 1360, 7020, 9999])
def test_small_batches_never_reach_the_batch_norms_of_one_pixel(num_examples):
    chosen = recipe("vgg11-bn", "cifar10", num_examples)
    last = num_examples % chosen.batch_size or chosen.batch_size
    assert chosen.batch_size <= 96
    assert last == num_examples or last > 0.9 * chosen.batch_size


def test_misuse_says_what_to_do(digits):
    empty = dataclasses.replace(digits, inputs=digits.inputs[:0], targets=digits.targets[:0])
    with pytest.raises(DataError, match="no examples in digits"):
        train(small(), empty, epochs=1, learning_rate=0.1)
    with pytest.raises(DataError, match="no examples in digits"):
        accuracy(small(), empty)
    for change in (
        {"epochs": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
    ):
        with pytest.raises(OptionError, match=next(iter(change))):
            train(small(), digits, **({"epochs": 1, "learning_rate": 0.1} | change))
    with pytest.raises(OptionError, match="one of 'mlp'"):
        recipe("vgg", "mnist")
    with pytest.raises(OptionError, match="one of 'digits'"):
        recipe("mlp", "svhn")
    with pytest.raises(OptionError, match="at least 1"):
        recipe("mlp", "mnist", 0)


# --- checkpoints


def test_a_checkpoint_returns_the_weights_the_buffers_and_the_note(tmp_path, digits):
    model, fresh = small(), small(seed=1)
    train(model, digits, epochs=1, learning_rate=0.05)  # moves the buffers of batch norm too
    path = tmp_path / "new" / "model.safetensors"
    save_checkpoint(path, model, {"epoch": 1, "name": "mlp-bn", "losses": [0.5]})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_checkpoint(path, fresh) == {"epoch": 1, "name": "mlp-bn", "losses": [0.5]}
    assert same_state(model, fresh)


def test_tied_weights_survive(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model, fresh = tied(), tied()
    save_checkpoint(tmp_path / "m", model)
    assert load_checkpoint(tmp_path / "m", fresh) == {}
    assert same_state(model, fresh)
    assert fresh[0].weight is fresh[1].weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: t for name, t in state.items() if "num_batches" not in name},
    ],
)
def test_torch_files_of_state_dicts_are_read(tmp_path, wrap):
    model, fresh = small(), small(seed=1)
    path = tmp_path / "model.pth"
    torch.save(wrap(model.state_dict()), path)
    assert load_checkpoint(path, fresh) == {}
    assert same_state(model, fresh)


def test_a_checkpoint_of_another_network_says_what_differs_and_changes_nothing(tmp_path):
    model, before = small(), small()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, mlp((1, 8, 8), 5, widths=(512, 512)))
    with pytest.raises(FileError) as caught:
        load_checkpoint(path, model)
    for part in ("bn1.weight is missing", "and 8 more", "does not fit"):
        assert part in str(caught.value)
    save_checkpoint(path, build("mlp-bn", input_shape=(1, 8, 8), num_classes=5))
    with pytest.raises(FileError, match=r"fc3.weight is \(5, 512\), not \(10, 512\)"):
        load_checkpoint(path, model)
    assert same_state(model, before)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("broken-out",)


def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small()
    with pytest.raises(FileError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt", model)
    save_checkpoint(tmp_path / "a.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        raw = (tmp_path / name).read_bytes()
        for keep in (0, 5, 100, len(raw) // 2, len(raw) - 1):
            (tmp_path / "short").write_bytes(raw[:keep])
            with pytest.raises(FileError, match="truncated"):
                load_checkpoint(tmp_path / "short", model)
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(FileError, match="more than weights"):
        load_checkpoint(tmp_path / "evil.pt", model)
    assert not (tmp_path / "broken-out").exists()
    torch.save({"epoch": 3}, tmp_path / "c.pt")
    with pytest.raises(FileError, match="holds no state dict"):
        load_checkpoint(tmp_path / "c.pt", model)


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "model.safetensors", small())
    with pytest.raises(OptionError, match="meta cannot be saved"):
        save_checkpoint(tmp_path / "model.safetensors", small(), {"epoch": object()})
