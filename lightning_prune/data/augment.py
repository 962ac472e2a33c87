"""Pictures as a network sees them: resized, cropped, mirrored; what is random is drawn from (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightning_prune.protocols import InputError

Crop = Literal["center", "random"]
_STREAM = 1  # apart from the order of an epoch, which is drawn from (seed, epoch)
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Draw:
    """What is random about one picture in one epoch.

    Attributes:
        mirrored: whether left and right are exchanged.
        across: horizontal place of a random crop, in [0, 1).
        down: vertical place of a random crop, in [0, 1).
    """

    mirrored: bool
    across: float
    down: float

    @classmethod
    def of(cls, seed: int, epoch: int, index: int) -> Draw:
        """A pure function of its arguments, so a resumed run draws what an uninterrupted one draws."""
        coin, across, down = np.random.default_rng((seed, epoch, index, _STREAM)).random(3)
        return cls(bool(coin < 0.5), float(across), float(down))


@dataclass(frozen=True)
class ImageTransform:
    """A picture of any size and mode to uint8 [channels, size, size].

    With `cut` that box is taken first. The shorter side is resized to `size` (bicubic, antialiased), the longer one
    cropped. A picture that already has the size is untouched to the last bit. Transparent pictures are laid on
    white; orientation tags are followed.

    Args:
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey.
        crop: which part of the longer side is kept while training; the centre otherwise.
        flip: mirror half of the pictures while training.
        cut: left, top, right and bottom of the only part that is looked at, in pixels of the picture.

    Raises:
        InputError: a size that is not positive, other channels, a box without an inside.
    """

    size: int
    channels: int = 3
    crop: Crop = "center"
    flip: bool = False
    cut: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"data.size: {self.size} is not positive")
        if self.channels not in _MODES:
            raise InputError(f"data.channels: {self.channels}, expected 1 (grey) or 3 (colour)")
        if self.cut is not None and not (0 <= self.cut[0] < self.cut[2] and 0 <= self.cut[1] < self.cut[3]):
            raise InputError(f"data.cut: {list(self.cut)}, expected left, top, right and bottom of a box in pixels")

    def __call__(self, picture: Image.Image, draw: Draw | None = None) -> Tensor:
        """uint8 [channels, size, size]; without a draw the centre of the picture, not mirrored."""
        picture = self._resized(self._flat(self._cut(ImageOps.exif_transpose(picture))))
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        if draw is not None and self.crop == "random":
            left = int(draw.across * (picture.width - self.size + 1))
            top = int(draw.down * (picture.height - self.size + 1))
        pixels = np.array(picture.crop((left, top, left + self.size, top + self.size)), dtype=np.uint8)
        if draw is not None and self.flip and draw.mirrored:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels)).view(self.size, self.size, -1).permute(2, 0, 1)

    def _cut(self, picture: Image.Image) -> Image.Image:
        if self.cut is None:
            return picture
        if picture.width < self.cut[2] or picture.height < self.cut[3]:
            raise ValueError(f"{picture.width} x {picture.height} pixels do not hold the box of data.cut {self.cut}")
        return picture.crop(self.cut)

    def _flat(self, picture: Image.Image) -> Image.Image:
        """The picture in the mode of its channels, without transparency."""
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"pictures of mode {picture.mode} (more than 8 bits a channel) are not read")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
        return picture.convert(_MODES[self.channels])

    def _resized(self, picture: Image.Image) -> Image.Image:
        shorter = min(picture.size)
        if shorter == self.size:
            return picture
        width, height = (max(self.size, round(side * self.size / shorter)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)
