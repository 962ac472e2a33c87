"""What the layers promise each other: small values and structural types, no behaviour.

Nothing here imports from the rest of the package, so every layer may import this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class InputError(ValueError):
    """Input a user can correct: one line naming the key or the file. The command line ends with status 2."""


class GateNotMet(Exception):
    """A condition on a result that does not hold. The command line ends with status 3."""


@dataclass(frozen=True, order=True)
class Sparsity:
    """An N:M pattern: keep `n` of every `m` consecutive weights along the input dimension.

    `n == m` is dense. Written "2:4" wherever people read or write it.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"sparsity {self.n}:{self.m}: N:M keeps N of every M weights, so 1 <= N <= M")

    @classmethod
    def parse(cls, text: str | tuple[int, int] | Sparsity) -> Sparsity:
        """Read "2:4" or (2, 4). Raises `InputError` when that is not N:M with 1 <= N <= M."""
        if isinstance(text, Sparsity):
            return text
        if isinstance(text, tuple | list) and len(text) == 2 and all(type(number) is int for number in text):
            return cls(*text)
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if match is None:
            raise InputError(f"sparsity {text!r}: expected N:M, for example 2:4")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Fraction of weights kept, in (0, 1]."""
        return self.n / self.m

    @property
    def fraction(self) -> float:
        """Fraction of weights removed, in [0, 1)."""
        return 1 - self.density

    @property
    def is_dense(self) -> bool:
        return self.n == self.m

    @property
    def is_within_2to4(self) -> bool:
        """Whether no aligned group of four ever keeps more than two, which is what sparse tensor cores read."""
        return self.n == 1 < self.m or (self.n == 2 and self.m % 4 == 0)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class PrunableUnit:
    """One part of a network that a method may touch.

    Attributes:
        name: qualified name of the module inside the network.
        kind: "linear" or "conv" for weights fit for N:M; further kinds name blocks and channel groups.
        parameters: qualified names of the parameters that belong together.
        group_size: length of the input dimension that N:M groups run along.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    group_size: int


@dataclass(frozen=True)
class WidthCut:
    """A dimension of a parameter that shrinks when units of a width group go.

    Attributes:
        parameter: qualified name of the parameter inside the network.
        dim: the dimension.
        repeats: how often the units follow each other along it, as the two halves of a gated projection do.
    """

    parameter: str
    dim: int
    repeats: int = 1


@dataclass(frozen=True)
class WidthGroup:
    """Units of one inner width that may be removed from a network: heads, feed-forward channels, groups of a norm.

    Attributes:
        name: qualified name of the module whose inner width it is.
        kind: "heads", "channels" or "norm-groups".
        output: qualified name of the layer that reads the units; its other input columns can make up for them.
        units: number of units, at least 2.
        channels: channels of a unit.
        taps: input columns of `output` for each channel; those of a kernel, 1 for a linear layer.
        cuts: every parameter that shrinks, the weight of `output` among them.
    """

    name: str
    kind: str
    output: str
    units: int
    channels: int
    taps: int
    cuts: tuple[WidthCut, ...]

    @property
    def columns(self) -> int:
        """Input columns of `output` that belong to one unit."""
        return self.channels * self.taps


@dataclass(frozen=True)
class Plan:
    """What a method would leave at its target, known from shapes alone.

    Attributes:
        axis: what it changes: "weights", "widths", "gates", or "none".
        target: the target, in the words of the config.
        touched: names of the layers, groups or blocks it may change.
        macs_kept: fraction of the dense trajectory's MACs (aten) at the target.
        parameters_kept: parameters that are not zero; None where only the run decides.
        holds_teacher: whether training holds a frozen copy of the network on the device.
    """

    axis: str
    target: str
    touched: tuple[str, ...]
    macs_kept: float
    parameters_kept: int | None
    holds_teacher: bool = False


@runtime_checkable
class Planned(Protocol):
    """A method that knows before a run what it would leave."""

    def planned(self) -> Plan: ...


@runtime_checkable
class SparsityControl(Protocol):
    """Something whose weight sparsity can be changed and inspected while it trains."""

    def set_sparsity(self, sparsity: Sparsity | None) -> None: ...

    def check_sparsity(self, sparsity: Sparsity | None) -> None:
        """Raises `InputError` for a pattern that no layer can have."""

    def density_by_layer(self) -> Mapping[str, float]: ...

    def mask_violations(self, compare: bool = False) -> int: ...


@runtime_checkable
class ImageSampler(Protocol):
    """Something that draws images in [-1, 1] for sample ids and labels, a pure function of both."""

    def sample_images(self, ids: Tensor, cond: Any, sampler: Any) -> Tensor: ...


@runtime_checkable
class StepAware(Protocol):
    """A denoiser whose work depends on the step of the sampler."""

    def at_step(self, index: int, calls: int) -> None:
        """Called before each of the `calls` network calls of a trajectory; index 0 starts a new one."""

    def phase(self, index: int, calls: int) -> Hashable:
        """Steps of equal phase cost the same."""


@runtime_checkable
class VariantSource(Protocol):
    """Something that names the networks to report beside each other; the last one is its result."""

    process: Any
    weights_kind: str

    def variants(self) -> dict[str, Any]: ...


@runtime_checkable
class Remarks(Protocol):
    """Something that has to say more of its result than numbers."""

    def remarks(self) -> list[str]:
        """Sentences for the report."""


@runtime_checkable
class SamplerBound(Protocol):
    """Something whose result may be made for one sampler."""

    def check_sampler(self, sampler: Any) -> None:
        """Raises `InputError` for a sampler that the result is not for."""


@runtime_checkable
class Predictor(Protocol):
    """Something that draws images in `predict`, by a sampler that may be chosen."""

    predict_sampler: Any


@runtime_checkable
class ArtifactFiles(Protocol):
    """Something whose artifact holds further files."""

    def artifact_files(self) -> Mapping[str, str]:
        """Texts by file name."""


@runtime_checkable
class GateSource(Protocol):
    """Something that has found schedules of gates, by budget; the last one is its result."""

    costs: Any

    def schedules(self) -> Mapping[str, Any]: ...


@runtime_checkable
class ResultHook(Protocol):
    """A callback that works on the final weights, after averaging has put them in place."""

    def on_result(self, trainer: Any, pl_module: Any) -> None: ...


@runtime_checkable
class TaskBar(Protocol):
    """A progress bar that shows tasks beside the training."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a task of `total` parts; what it yields advances it by a number of parts."""


class ReferenceData(Protocol):
    """A labelled data set with a training split, a reference split and a held-out split of uint8 images."""

    name: str
    num_classes: int

    def split(self, split: Any) -> Any:
        """An object with `images` uint8 [N, C, H, W] and `labels` int64 [N]."""


@dataclass(frozen=True)
class RealImages:
    """Real images of a split.

    Attributes:
        images: uint8 [N, C, H, W], as a tensor or as something that gives one when sliced.
        name: which they are, in words.
        identity: what tells them from others, where that is known without reading them; None for their bytes.
    """

    images: Any
    name: str
    identity: str | None = None


@runtime_checkable
class LatentData(Protocol):
    """Data whose samples are latents: what is shown and compared are the pictures that `decoder` makes of them."""

    decoder: Any

    def real_images(self, split: Any) -> RealImages:
        """Real pictures of a split, or decoded latents of such."""


@runtime_checkable
class CostModel(Protocol):
    """Something that knows the multiply-accumulates of one network call, by layer."""

    def kept_fraction(self) -> Mapping[str, float]: ...
