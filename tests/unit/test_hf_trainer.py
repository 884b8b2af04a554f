"""`InhibitionCallback` in real Hugging Face Trainers, against written-out losses and a plain PyTorch loop.

Shapes: B sequences, T tokens, N neurons.
"""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainerCallback, TrainingArguments

from l2e_ds import InhibitionCallback, Inhibitor, Settings, neuron_sites
from l2e_ds.errors import CheckpointError, ConfigError

LENGTH, VOCABULARY, LAYERS, NEURONS = 12, 40, 3, 32
SHARE, COEFFICIENT, RATE = 0.05, 0.3, 0.05
SETTINGS = {"loss": "published", "target_share": SHARE, "coefficient": COEFFICIENT, "statistics_window": None}
PADDING = 0


def network() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=NEURONS,
            hidden_act="gelu",
            max_position_embeddings=LENGTH,
        )
    )


def sequences(count: int, padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return sequences of one length; if padded, right-padded by different numbers of tokens."""
    rows = []
    for number in range(count):
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(number))
        mask = torch.arange(LENGTH) < LENGTH - (number * 5 % 7 if padded else 0)
        tokens = torch.where(mask, tokens, PADDING)
        rows.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": torch.where(mask, tokens, -100)})
    return rows


class Notes(TrainerCallback):
    """Collects every step's gradients, before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.logs: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def trainer(folder, rows, accumulation=1, batch=8, callbacks=(), model=None, **changes) -> Trainer:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    return Trainer(
        model or network(), TrainingArguments(**values), train_dataset=rows, eval_dataset=rows, callbacks=[*callbacks]
    )


def train(folder, rows, accumulation=1, **changes) -> tuple[Notes, InhibitionCallback, torch.nn.Module]:
    """Train with inhibition of two layers of three, with 8 sequences a step on one rank."""
    notes, ours = Notes(), InhibitionCallback([0, 2], **SETTINGS)
    done = trainer(folder, rows, accumulation, callbacks=[ours, notes], **changes)
    done.train()
    return notes, ours, done.model


def assert_close(ours: Notes, other: Notes) -> None:
    assert len(ours.gradients) == len(other.gradients) > 2
    for one, two in zip(ours.gradients, other.gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-6)


# --- gradients ---------------------------------------------------------------------------------------------------


def plain_loop(rows, batch=8) -> tuple[Notes, Inhibitor]:
    """Train the same steps, written out with an `Inhibitor`."""
    notes, model = Notes(), network().train()
    with Inhibitor(neuron_sites(model, [0, 2]), Settings(**SETTINGS)) as inhibitor:
        for begin in range(0, len(rows), batch):
            tokens = torch.stack([row["input_ids"] for row in rows[begin : begin + batch]])
            loss = inhibitor.attach_loss(model(input_ids=tokens, labels=tokens).loss)
            loss.backward()
            notes.on_pre_optimizer_step(None, None, None, model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
            inhibitor.step()
    return notes, inhibitor


@pytest.mark.parametrize("accumulation", [1, 4])
def test_as_a_plain_loop(accumulation, tmp_path):
    """Every step's gradients and the final state are equal, whether the Trainer accumulates or not."""
    rows = sequences(32)
    expected, inhibitor = plain_loop(rows)
    notes, ours, _ = train(tmp_path, rows, accumulation)
    assert_close(notes, expected)
    state = ours.inhibitor.state_dict()
    for name, value in inhibitor.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert float(inhibitor.last[:, 0].min()) > 0


@pytest.mark.parametrize("changes", [{"average_tokens_across_devices": False}, {"gradient_checkpointing": True}])
def test_the_same_otherwise(changes, tmp_path):
    rows = sequences(32)
    assert_close(train(tmp_path, rows, 2, **changes)[0], plain_loop(rows)[0])


def test_where_the_model_does_not_take_the_count(tmp_path):
    """A model without loss arguments returns a mean, which the Trainer divides by the accumulated micro-batches."""
    model = network()
    model.accepts_loss_kwargs = False
    assert_close(train(tmp_path, sequences(32), 4, model=model)[0], plain_loop(sequences(32))[0])


def test_padded_batches_as_written_out(tmp_path):
    """Compare with float64 autograd of sum w_i (cross-entropy + lambda L_MS) over micro-batches of many lengths,
    without padding."""
    rows = sequences(24, padded=True)
    model = network()
    reference = copy.deepcopy(model).double()
    notes, _, _ = train(tmp_path, rows, 4, model=model, learning_rate=0.0)  # the weights do not move
    neurons: list[torch.Tensor] = []
    for layer in (0, 2):
        reference.gpt_neox.layers[layer].mlp.act.register_forward_hook(lambda _m, _i, output: neurons.append(output))

    def forward(part):
        neurons.clear()
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        mask, targets = batch["attention_mask"].bool(), batch["labels"][:, 1:]
        logits = reference(input_ids=batch["input_ids"], attention_mask=mask).logits[:, :-1]
        summed = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return summed, int((targets != -100).sum()), [z[mask] for z in neurons]

    # the third step's statistics are those of the two before it
    seen = [torch.cat(zs).detach() for zs in zip(*(forward(rows[i : i + 8])[2] for i in (0, 8)), strict=True)]
    items = sum(forward(rows[i : i + 2])[1] for i in range(16, 24, 2))
    total = torch.zeros((), dtype=torch.float64)
    for begin in range(16, 24, 2):
        summed, count, zs = forward(rows[begin : begin + 2])
        total = total + summed / items
        for layer, z, before in zip((0, 2), zs, seen, strict=True):
            d2 = (z - before.mean(0)) ** 2
            selected = d2.detach() / before.var(0) >= notes.logs[2][f"layer{layer}/tau"]
            assert 0 < int(selected.sum()) < selected.numel()
            total = total + count / items * COEFFICIENT * d2[selected].log().sum() / (SHARE * z.numel())
    total.backward()
    for (name, exact), found in zip(reference.named_parameters(), notes.gradients[2], strict=True):
        largest = float(exact.grad.abs().max())
        torch.testing.assert_close(found.double(), exact.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


# --- around training ---------------------------------------------------------------------------------------------


def test_evaluation_and_logs(tmp_path):
    """Evaluation counts nothing and changes nothing; only lines of training gain the step's metrics."""
    rows = sequences(32)
    expected = train(tmp_path, rows)[0]
    notes, ours, model = train(tmp_path, rows, eval_strategy="steps", eval_steps=1)
    assert_close(notes, expected)
    of_training = [logs for logs in notes.logs if "loss" in logs]
    others = [logs for logs in notes.logs if "loss" not in logs]
    assert len(of_training) == 4 and any("eval_loss" in logs for logs in others)
    assert not any("observed_share" in logs for logs in others)
    assert of_training[-1].items() >= ours.inhibitor.metrics().items()
    assert {"layer0/tau", "layer2/observed_share", "layer2/selected_score", "layer2/mean_s"} <= of_training[0].keys()
    assert not any("Inhibited" in type(module).__name__ for module in model.modules())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_history_has_the_figures(tmp_path):
    done = trainer(tmp_path, sequences(16), callbacks=[InhibitionCallback(**SETTINGS)])
    done.train()
    assert [line["observed_share"] >= 0 for line in done.state.log_history if "loss" in line] == [True, True]


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_is_uninterrupted(restore, tmp_path):
    """Weights, moments and thresholds are bit-identical, also if transformers makes the callback anew."""
    rows = sequences(32)
    changes = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.02}
    _, whole, model = train(tmp_path / "whole", rows, 2, **changes)
    again, checkpoint = InhibitionCallback([0, 2], **SETTINGS), str(tmp_path / "whole/checkpoint-2")
    resumed = trainer(
        *(tmp_path / "resumed", rows, 2),
        callbacks=[again],
        model=GPTNeoXForCausalLM.from_pretrained(checkpoint),  # the Trainer of 5.23 does not restore its output matrix
        restore_callback_states_from_checkpoint=restore,
        **changes,
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    for one, two in zip(model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    found = resumed.pop_callback(InhibitionCallback)
    assert (found is again) != restore
    assert found.settings == whole.settings and found.layers == whole.layers
    state = found.inhibitor.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.inhibitor.state_dict().items())
    assert int(state["steps"]) == 4


def test_resuming_what_does_not_fit(tmp_path, caplog):
    """Other settings are named, and other layers are refused; a checkpoint without the callback's state starts the
    statistics anew, with a warning."""
    rows = sequences(16)
    changes = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, rows, **changes)
    checkpoint = tmp_path / "checkpoint-1"
    other = trainer(tmp_path, rows, callbacks=[InhibitionCallback([1], **SETTINGS)], **changes)
    misfit = pytest.raises(CheckpointError, match="InhibitionCallback: .* does not fit")
    with caplog.at_level(logging.WARNING, "l2e_ds.hf_trainer"), misfit:
        other.train(resume_from_checkpoint=str(checkpoint))
    assert "differs from the checkpoint's (the schedule in steps): layers: [0, 2] -> [1]" in caplog.text
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["InhibitionCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    ours = InhibitionCallback([0, 2], **SETTINGS)
    with caplog.at_level(logging.WARNING, "l2e_ds.hf_trainer"):
        trainer(tmp_path, rows, callbacks=[ours], **changes).train(resume_from_checkpoint=str(checkpoint))
    assert "saved without it" in caplog.text
    assert int(ours.inhibitor.state_dict()["steps"]) == 1


class Interrupting(TrainerCallback):
    """Acts as Ctrl-C after the first step."""

    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_interrupted(tmp_path):
    """The Trainer does not report the end of training here: `detach` removes the hooks, and another may begin."""
    ours, model = InhibitionCallback([0, 2], **SETTINGS), network()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, sequences(16), model=model, callbacks=[ours, Interrupting()]).train()
    assert model._forward_hooks
    ours.detach()
    assert [type(module) for module in model.modules()] == modules
    assert not model._forward_hooks and not model._forward_pre_hooks
    _, again, _ = train(tmp_path, sequences(16), model=model)
    assert int(again.inhibitor.state_dict()["steps"]) == 2 and int(ours.inhibitor.state_dict()["steps"]) == 1


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Settings.target_share: got 2, allowed: between 0 and 1"):
        InhibitionCallback(target_share=2)
    smoothed = trainer(tmp_path, sequences(8), callbacks=[InhibitionCallback()], label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        smoothed.train()
    several = trainer(tmp_path, sequences(8), callbacks=[InhibitionCallback()])
    several.args._n_gpu = 2
    with pytest.raises(ConfigError, match="one process a GPU"):
        several.callback_handler.on_train_begin(several.args, several.state, several.control)
    twice = trainer(tmp_path, sequences(8), callbacks=[InhibitionCallback([1]), InhibitionCallback([0, 1])])
    with pytest.raises(ValueError, match="layer 1 has the hook of another Inhibitor"):
        twice.train()
    misspelt = trainer(tmp_path, sequences(8), callbacks=[InhibitionCallback("mid-3")])
    with pytest.raises(ConfigError, match=r"inhibition\.layers: got 'mid-3', allowed: mid-2, "):
        misspelt.train()
