"""How far two float32 trainings of the same thing may lie apart, derived from what they compute."""

from __future__ import annotations

import math


def rounding(steps: int, layers: int, tokens: int) -> float:
    """Relative, of losses, moments and scales after so many steps of so many tokens.

    Two set-ups add the same numbers in another order, or by other instructions. Each such sum of n terms is then off by
    about sqrt(n) roundings of 2^-24; the longest have one term a token. In a step they follow upon each other in each
    layer, forward (attention twice, MLP twice) and backward (twice as many), and the weights carry a step's error to
    the next. Independent errors add up like their square root; four standard deviations are allowed.
    """
    return 4 * math.sqrt(steps * layers * 12 * tokens) * 2.0**-24


def selection(tokens: int, neurons: int, share: float = 0.02) -> float:
    """Relative, of what counts or averages a layer's selected activations of a step, and of a gradient with theirs.

    Rounding may put an activation on the other side of tau: two of the tokens * neurons * share may be.
    """
    return 2 / (tokens * neurons * share)
