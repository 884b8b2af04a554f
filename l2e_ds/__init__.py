"""Pretrain language models while inhibiting their most monosemantic neurons (L2E), on DeepSpeed."""

__version__ = "0.1.0"
