"""Which network at which step: one per stage of the trajectory, chosen by step index."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.protocols import InputError, WidthGroup


def stage_of_step(lengths: Sequence[int], index: int, calls: int) -> int:
    """Number of the stage of `lengths` steps that computes call `index` of `calls`; a single one computes any.

    Raises:
        InputError: stages that were made for another number of calls: stretched, they would cost another share.
    """
    if not 0 <= index < calls:
        raise InputError(f"stages: call {index} of a trajectory of {calls}")
    if len(lengths) == 1:
        return 0
    if calls != sum(lengths):
        raise InputError(f"steps: the stages are for trajectories of {sum(lengths)} network calls, not {calls}")
    position = index
    for number, length in enumerate(lengths):
        if position < length:
            return number
        position -= length
    raise AssertionError("the position is within the sum of lengths")


class StagedDenoiser(Denoiser):
    """Slim networks for stages of the trajectory behind one signature.

    Tensors that no stage cut are held once, because the networks share them.

    Args:
        dense: the denoiser that the stages were cut from; it lends its inputs and outputs, and is not kept.
        networks: one network per stage, the noisiest first.
        lengths: sampling steps of each stage.
        facts: how the stages came about, for the manifest; plain JSON.
    """

    def __init__(
        self,
        dense: Denoiser,
        networks: Sequence[nn.Module],
        lengths: Sequence[int],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if len(networks) != len(lengths) or not lengths or min(lengths) < 1:
            raise InputError(f"stages: {len(networks)} networks for stages of {list(lengths)} steps")
        self.weights = dense.weights
        self.sample_shape, self.num_classes = dense.sample_shape, dense.num_classes
        self.lengths, self.facts = tuple(lengths), dict(facts or {})
        self.network: Any = nn.ModuleList(networks)
        self._shells = tuple(_shell(dense, network) for network in networks)
        self._family = type(dense)
        self._stage = 0

    @property
    def networks(self) -> nn.ModuleList:
        """One network per stage, the noisiest first."""
        return cast(nn.ModuleList, self.network)

    @property
    def family(self) -> type[Denoiser]:
        """The family of the denoiser it was cut from."""
        return self._family

    @property
    def steps(self) -> int:
        """Sampling steps that the stages were made for."""
        return sum(self.lengths)

    @property
    def stored(self) -> Any:
        return self._shells[0].stored

    def at_step(self, index: int, calls: int) -> None:
        self._stage = stage_of_step(self.lengths, index, calls)

    def phase(self, index: int, calls: int) -> Hashable:
        return stage_of_step(self.lengths, index, calls)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        output: Tensor = self._shells[self._stage](x, t, cond)
        return output

    def null_condition(self, cond: Condition) -> Condition:
        return self._shells[0].null_condition(cond)

    def blank_condition(self, batch: int, device: torch.device | str) -> Condition:
        return self._shells[0].blank_condition(batch, device)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return self._shells[self._stage].guide(conditional, unconditional, scale)

    def config(self) -> dict[str, Any]:
        return self._shells[0].config()

    def arguments(self) -> dict[str, Any]:
        return self._shells[0].arguments()

    def default_dense(self) -> Sequence[str]:
        return [rf"\d+\.(?:{pattern})" for pattern in self._shells[0].default_dense()]

    def groups(self) -> Sequence[WidthGroup]:
        raise InputError("denoiser: its stages have been cut already; prune the dense network instead")

    def __deepcopy__(self, memo: dict[int, Any]) -> StagedDenoiser:
        networks = [deepcopy(network, memo) for network in self.networks]
        other = StagedDenoiser(self._shells[0], networks, self.lengths, self.facts)
        other._family, other._stage = self._family, self._stage
        memo[id(self)] = other
        return other.train(self.training)


def check_one_stage(denoiser: Denoiser) -> None:
    """Raise `InputError` for slim networks of several stages, where training draws timesteps of all at random."""
    if isinstance(denoiser, StagedDenoiser) and len(denoiser.networks) > 1:
        count = len(denoiser.networks)
        raise InputError(f"model.denoiser: slim networks of {count} stages train by mosaicdiff.Recovery alone")


def _shell(dense: Denoiser, network: nn.Module) -> Denoiser:
    """The denoiser around another network; both are kept out of the module tree of whoever holds the shell."""
    shell = copy(dense)
    # A shallow copy shares the table of submodules with its original.
    shell._modules = {**dense._modules, "network": network}
    return shell


class PipelineRouter(nn.Module):
    """A drop-in for `pipe.transformer` or `pipe.unet`: chooses the stage by the scheduler's timestep.

    What a pipeline asks of its network beside calling it (its configuration, its parts) is the first stage's.

    Args:
        denoiser: the stages.
        timesteps: the scheduler's timestep of every step they were made for, falling; a call at a timestep between two
            of them belongs to the later step.
    """

    def __init__(self, denoiser: StagedDenoiser, timesteps: Sequence[float]) -> None:
        super().__init__()
        if len(timesteps) != denoiser.steps:
            raise InputError(f"stages: {len(timesteps)} timesteps for stages of {denoiser.steps} steps")
        self.networks = denoiser.networks
        self.scale = denoiser.family.timestep_scale
        ends = [sum(denoiser.lengths[: i + 1]) for i in range(len(denoiser.lengths))]
        self.last_timesteps = [float(timesteps[end - 1]) for end in ends]
        self._position = list(inspect.signature(self.networks[0].forward).parameters).index("timestep")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "networks" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.networks[0], name)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: the first stage alone would be written."""
        raise InputError("stages: diffusers has no folder for them; keep the artifact that they were loaded from")

    def stage(self, timestep: Any) -> int:
        """Number of the stage at what a network is given for a timestep: the first that ends at it or a cleaner one."""
        t = torch.as_tensor(timestep).flatten()[0]
        kind = t.dtype if t.is_floating_point() else torch.float64
        # Rounded and scaled as the pipeline does it, so that a step at the end of a stage stays in it.
        ends = torch.tensor(self.last_timesteps, dtype=kind, device=t.device)
        ends = ends if self.scale == 1 else ends / self.scale
        return min(int((t < ends).sum()), len(self.last_timesteps) - 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self._position]
        return self.networks[self.stage(timestep)](*args, **kwargs)
