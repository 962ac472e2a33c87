"""A value without its protocol is not a number: how samples were drawn and compared, hashed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """Everything a distance depends on besides the weights.

    Two values may stand in one table only when the hashes of their protocols agree.
    """

    name: str
    samples: int
    sampler: str
    process: str
    steps: int
    guidance: float
    sample_seed: int
    extractor: str
    extractor_sha256: str
    reference: str
    reference_samples: int
    weights: str
    dtype: str = "float32"
    resize: str = "none"
    rank_deficient: bool = False  # fewer samples than features: the covariance cannot be full
    interval: str = "infinitesimal jackknife, 95 %"
    prompts: str | None = None  # which prompts samples are drawn for, where they are not drawn for classes
    decoder: str | None = None  # what made pictures of latents

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:12]

    def content(self) -> dict[str, Any]:
        """The fields, for a report; those that do not apply are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}
