"""DiP-GO: learned gates over blocks and steps (Zhu et al., NeurIPS 2024)."""

from lightning_prune.methods.dipgo.module import DiPGO
from lightning_prune.methods.dipgo.rules import GateRule

__all__ = ["DiPGO", "GateRule"]
