"""What users can measure on their own machines: `l2e-ds bench NAME`."""

NAMES = {
    "overhead": "what a step costs more with inhibition",
    "scaling": "how the cost of inhibition grows with neurons, tokens, layers and ranks",
    "memory": "what inhibition adds to the memory of a step, by the number of tokens",
    "analysis": "what `l2e-ds analyze` costs beside its forward passes, and its memory",
    "data": "how fast text becomes tokens and tokens become batches",
    "faults": "kill, hang and damage a small run again and again; compare each resume with the undisturbed run",
    "throughput": "tokens/s and memory against the Hugging Face Trainer and a minimal DeepSpeed loop",
}
