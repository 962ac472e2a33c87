"""Callbacks. Each asks the module for a capability (see `protocols`), never for a class."""

from lightning_prune.callbacks.artifact_writer import ArtifactWriter
from lightning_prune.callbacks.distance_evaluation import DistanceEvaluation
from lightning_prune.callbacks.efficiency_report import EfficiencyReport
from lightning_prune.callbacks.gate_map import GateMap
from lightning_prune.callbacks.image_writer import ImageWriter
from lightning_prune.callbacks.last_checkpoint import LastCheckpoint
from lightning_prune.callbacks.mask_invariant import MaskInvariant
from lightning_prune.callbacks.mask_map import MaskMap
from lightning_prune.callbacks.progress import StepProgress
from lightning_prune.callbacks.run_record import RunRecord
from lightning_prune.callbacks.sample_grid import SampleGrid
from lightning_prune.callbacks.sparsity_ramp import SparsityRamp
from lightning_prune.callbacks.stop_on_signal import StopOnSignal

__all__ = [
    "ArtifactWriter",
    "DistanceEvaluation",
    "EfficiencyReport",
    "GateMap",
    "ImageWriter",
    "LastCheckpoint",
    "MaskInvariant",
    "MaskMap",
    "RunRecord",
    "SampleGrid",
    "SparsityRamp",
    "StepProgress",
    "StopOnSignal",
]
