"""What a run leaves behind: the artifact, the report."""

from lightning_prune.export.artifact import load, save_artifact
from lightning_prune.export.switchable import set_sparsity, set_sparsity_by_step

__all__ = ["load", "save_artifact", "set_sparsity", "set_sparsity_by_step"]
