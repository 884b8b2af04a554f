"""Benchmarks, run from a checkout by `python -m benchmarks NAME`. Not part of the installed package."""

NAMES = {
    "overhead": ("benchmarks.overhead", "what inhibition adds to the time of a step"),
    "scaling": (
        "benchmarks.scaling",
        "how the cost of inhibition grows with neurons, tokens, layers and ranks",
    ),
    "memory": ("benchmarks.memory", "what inhibition adds to the memory of a step, by the number of tokens"),
    "analysis": (
        "benchmarks.analysis",
        "what `l2e-ds analyze` costs beside its forward passes, and its memory",
    ),
    "data": ("benchmarks.data", "how fast text becomes tokens and tokens become batches"),
    "faults": (
        "benchmarks.reliability.faults",
        "kill, hang and damage a small run again and again; compare each resume with the undisturbed run",
    ),
    "throughput": (
        "benchmarks.throughput",
        "tokens/s and memory against the Hugging Face Trainer and a minimal DeepSpeed loop",
    ),
}
"""The module of each benchmark and one line of help.

A module has OPTIONS by their names, PACKAGES, whose versions are recorded, `measure(arguments, launch)`, which returns
what was measured (rank 0's counts), and `page(results)`; some have OUTPUT, the default of --output, and
`add_arguments(parser)` for more options.
"""
