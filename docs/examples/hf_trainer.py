"""Inhibition in the Hugging Face Trainer: one callback. Seconds on a CPU, no downloads:

python docs/examples/hf_trainer.py
torchrun --nproc-per-node 2 docs/examples/hf_trainer.py
"""

import os
import tempfile
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

from l2e_ds import InhibitionCallback

STEPS, GLOBAL_BATCH, LENGTH, TARGET = 100, 8, 64, 0.02
RANKS = int(os.environ.get("WORLD_SIZE", "1"))

sources = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
text = torch.frombuffer(bytearray(sources), dtype=torch.uint8).long()  # one token a byte
rows = text[: STEPS * GLOBAL_BATCH * LENGTH].view(-1, LENGTH)
dataset = [{"input_ids": row, "labels": row} for row in rows]

torch.manual_seed(0)
model = GPTNeoXForCausalLM(
    GPTNeoXConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
    )
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // RANKS,
        learning_rate=1e-3,
        logging_steps=4,
        disable_tqdm=True,
        save_strategy="no",
    )
    inhibition = InhibitionCallback(target_share=TARGET, strength=0.05, start=0.3, warmup=0.2)  # shares of max_steps
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[inhibition])
    trainer.train()  # its lines show loss, observed_share, layer1/tau ...

logs = [line for line in trainer.state.log_history if "observed_share" in line]
share = sum(line["observed_share"] for line in logs[-15:]) / 15
assert abs(share - TARGET) < 0.25 * TARGET, f"the observed share {share:.2%} is not near its target {TARGET:.2%}"
if trainer.is_world_process_zero():
    print(f"observed share, mean of 15 of the last 60 steps: {share:.2%} (target {TARGET:.2%})")
