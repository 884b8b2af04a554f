"""Inhibition in a PyTorch training loop of one's own, stopped half-way and resumed. Seconds on a CPU, no downloads:

    python docs/examples/pytorch_loop.py

The lines that the method needs are marked. With several ranks (DistributedDataParallel) they are the same.
"""

import os
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from l2e_ds import Inhibitor, Settings, neuron_sites

STEPS, BATCH, LENGTH, TARGET = 100, 8, 64, 0.02
CONFIG = GPTNeoXConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=LENGTH,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

sources = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
text = torch.frombuffer(bytearray(sources), dtype=torch.uint8)  # one token a byte


def batch_of(step):
    """[BATCH, LENGTH] tokens, the same at every call."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + LENGTH] for start in starts]).long().to(DEVICE)


def build():
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(CONFIG).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = Settings(target_share=TARGET, strength=0.05, start=0.3, warmup=0.2)  # shares of run_steps
    inhibitor = Inhibitor(neuron_sites(model, "mid-2"), settings, run_steps=STEPS)  # 1
    inhibitor.attach()  # 2
    return model, optimizer, inhibitor


def train(model, optimizer, inhibitor, steps):
    shares = []
    for step in steps:
        tokens = batch_of(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        inhibitor.attach_loss(loss).backward()  # 3: the same loss; its backward pass adds the inhibition's gradient
        optimizer.step()
        optimizer.zero_grad()
        inhibitor.step()  # 4: moments and thresholds move
        figures = inhibitor.metrics()
        shares.append(figures["observed_share"])
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1}  loss {loss.item():.3f}  share {figures['observed_share']:.2%}"
                f"  tau {figures['layer1/tau']:.2f}  MS of the selected {figures['layer1/selected_score']:.1f}"
                f"  mean S {figures['layer1/mean_s']:.3f}"
            )
    return shares


parts = build()
train(*parts, range(STEPS // 2))
saved = [part.state_dict() for part in parts]  # torch.save writes it: model, optimizer, inhibitor
parts[2].detach()  # 5: the model is as it was

parts = build()
for part, state in zip(parts, saved, strict=True):
    part.load_state_dict(state)
shares = train(*parts, range(STEPS // 2, STEPS))

share = sum(shares[-50:]) / 50
assert abs(share - TARGET) < 0.25 * TARGET, f"the observed share {share:.2%} is not near its target {TARGET:.2%}"
print(f"observed share of the last 50 steps: {share:.2%} (target {TARGET:.2%})")
