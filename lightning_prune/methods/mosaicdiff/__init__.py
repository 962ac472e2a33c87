"""MosaicDiff: structural pruning whose widths differ along the trajectory (Guo et al., arXiv 2510.11962)."""

from lightning_prune.methods.mosaicdiff.module import MosaicDiff
from lightning_prune.methods.mosaicdiff.recipe import Recipe

__all__ = ["MosaicDiff", "Recipe"]
