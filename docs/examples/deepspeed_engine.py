"""Inhibition in a DeepSpeed training loop of one's own (ZeRO-2, two micro-batches a step). No downloads:

    deepspeed docs/examples/deepspeed_engine.py        # or: python docs/examples/deepspeed_engine.py

The lines that the method needs are marked. Seconds on a CPU.
"""

import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from l2e_ds import Inhibitor, Settings, neuron_sites

STEPS, GLOBAL_BATCH, ACCUMULATION, LENGTH, TARGET = 100, 8, 2, 64, 0.02

if "RANK" not in os.environ:  # started by python itself: a group of one
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on CPUs: compiled at start, used for inference only
deepspeed.init_distributed(distributed_port=int(os.environ["MASTER_PORT"]))
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
micro_batch = GLOBAL_BATCH // ACCUMULATION // ranks
device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))

sources = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
text = torch.frombuffer(bytearray(sources), dtype=torch.uint8)  # one token a byte


def micro_batches_of(step):
    """This rank's [ACCUMULATION, micro_batch, LENGTH] tokens of the step's global batch."""
    starts = torch.randint(len(text) - LENGTH, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([text[start : start + LENGTH] for start in starts]).long()
    return rows.view(ACCUMULATION, ranks, micro_batch, LENGTH)[:, rank].to(device)


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
).train()
# before deepspeed.initialize, as ZeRO-3 needs it; on the device that DeepSpeed will move the model to
settings = Settings(target_share=TARGET, strength=0.05, start=0.3, warmup=0.2)  # shares of run_steps
inhibitor = Inhibitor(neuron_sites(model, "mid-2"), settings, device, run_steps=STEPS)  # 1
inhibitor.attach()  # 2
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
    config={
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    },
)
shares = []
for step in range(STEPS):
    for tokens in micro_batches_of(step):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(inhibitor.attach_loss(loss, is_last=engine.is_gradient_accumulation_boundary()))  # 3
        engine.step()
    inhibitor.step(engine.was_step_applied())  # 4: not moved by steps that DeepSpeed skips
    figures = inhibitor.metrics()  # of all ranks
    shares.append(figures["observed_share"])
    if rank == 0 and (step + 1) % 20 == 0:
        print(
            f"step {step + 1}  loss {loss.item():.3f}  share {figures['observed_share']:.2%}"
            f"  tau {figures['layer1/tau']:.2f}  mean S {figures['layer1/mean_s']:.3f}",
            flush=True,
        )
# with every rank's engine.save_checkpoint: client_state={"inhibition": inhibitor.state_dict()}, and load_state_dict
inhibitor.detach()  # 5: the model is as it was

share = sum(shares[-50:]) / 50
assert abs(share - TARGET) < 0.25 * TARGET, f"the observed share {share:.2%} is not near its target {TARGET:.2%}"
if rank == 0:
    print(f"observed share of the last 50 steps: {share:.2%} (target {TARGET:.2%})")
torch.distributed.destroy_process_group()
