"""What a run leaves behind: the artefact, the report."""

from lightning_prune.export.artifact import load, save_artifact

__all__ = ["load", "save_artifact"]
