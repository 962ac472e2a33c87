"""Stages as stock diffusers folders, one each, where their widths are those that a configuration can say.

The classes of diffusers derive inner widths from outer ones: as many heads as the width has room for, feed-forward
channels as a multiple of it, channels inside a ResNet block as many as outside. So only a stage of full widths has a
configuration of its own; everything else needs the artifact.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.export.staged import dense_groups, kept_units
from lightning_prune.protocols import InputError


def write_homogeneous(denoiser: StagedDenoiser, folder: Path) -> list[Path]:
    """Write `stage-<number>/` for each stage, as `from_pretrained` of the network's class reads it.

    Raises:
        InputError: a width that no configuration of the class has, by name; nothing is written then.
    """
    network_class = denoiser.family.network_class.__name__
    groups = dense_groups(denoiser)
    for number, network in enumerate(denoiser.networks):
        for group in groups:
            if (kept := kept_units(network, group)) != group.units:
                raise InputError(
                    f"--format homogeneous: stage {number} keeps {kept} of {group.units} {group.kind} of {group.name}, "
                    f"a width that no configuration of {network_class} has"
                )
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, network in enumerate(denoiser.networks):
        stage = partial / f"stage-{number}"
        stage.mkdir(parents=True)
        config = {"_class_name": network_class, **denoiser.config()}
        (stage / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, stage / "diffusion_pytorch_model.safetensors")
    partial.rename(folder)
    return sorted(folder.iterdir())
