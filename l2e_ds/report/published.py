"""The published results of Wang et al. 2025 (arXiv 2503.23298)."""

from __future__ import annotations

import re

SOURCE = "Wang et al. 2025, arXiv 2503.23298"
STEPS, GLOBAL_BATCH, SEQUENCE_LENGTH = 14_300, 1024, 2048
TOKENS = STEPS * GLOBAL_BATCH * SEQUENCE_LENGTH

SIZES = ("70m", "410m", "2.8b")

# (task, examples in the prompt) -> for each of SIZES (Pythia, L2E)
BENCHMARKS: dict[tuple[str, int], tuple[tuple[float, float], ...]] = {
    ("mmlu", 0): ((0.2311, 0.2301), (0.2303, 0.2306), (0.2306, 0.2534)),
    ("mmlu", 5): ((0.2438, 0.2497), (0.2470, 0.2472), (0.2432, 0.2443)),
    ("bigbench_lite", 0): ((0.2188, 0.2242), (0.2198, 0.2199), (0.2321, 0.2313)),
    ("bigbench_lite", 5): ((0.2140, 0.2235), (0.2377, 0.2266), (0.2252, 0.2320)),
    ("arc_challenge", 0): ((0.1706, 0.1877), (0.1852, 0.2031), (0.2304, 0.2304)),
    ("arc_challenge", 5): ((0.1834, 0.1860), (0.1988, 0.2056), (0.2346, 0.2415)),
    ("arc_easy", 0): ((0.3880, 0.3813), (0.4545, 0.4423), (0.5223, 0.5042)),
    ("arc_easy", 5): ((0.3708, 0.3864), (0.4811, 0.4798), (0.5522, 0.5358)),
}

# The only published False Killing Rates: those of plain Pythia-70M at a share k of 1 %.
FKR_PARAMETERS, FKR_SHARE = 70_426_624, 0.01
FKR = {"natural_language": 0.052, "data_subset": 0.218, "code_language": 0.67}  # by set of features
LOWEST_FKR_SHARE = 0.02  # the paper says "near"

# (method, size) -> extra time a step over plain pretraining
EXTRA_TIME = {
    ("l2e", "70m"): 0.034,
    ("l2e", "2.8b"): 0.015,
    ("memel", "70m"): 0.097,
    ("memel", "2.8b"): 0.270,
}

# size -> share k that did best
BEST_SHARE = {"70m": 0.01, "410m": 0.02, "2.8b": 0.03}


def fkr(features: str, parameters: int) -> float | None:
    """Return the published FKR of a set of features whose name contains that of one of the paper's, or None."""
    name = re.sub(r"[\W_]+", "_", features).lower()
    rate = next((rate for known, rate in FKR.items() if known in name), None)
    return rate if parameters == FKR_PARAMETERS else None


def benchmark(task: str, shots: int, size: str, method: str) -> float | None:
    """Return the published result of a benchmark, or None. method: none (the paper's Pythia) or l2e."""
    results = BENCHMARKS.get((task, shots))
    if results is None or size not in SIZES or method not in ("none", "l2e"):
        return None
    return results[SIZES.index(size)][method == "l2e"]
