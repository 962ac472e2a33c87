"""`lightning_prune cache-latents`: run autoencoder and text encoders once, into shards that train without either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_prune.data.base import DataModule
from lightning_prune.data.latent_cache import CacheSettings, CacheWriter
from lightning_prune.data.latent_files import Manifest

_READING_ONLY = (
    "batch_size",
    "seed",
    "workers",
    "worker_kind",
    "verify",
    "validation_samples",
)  # arguments that change no sample


def run(args: Sequence[str]) -> int:
    """Parse `args` and write the cache. Returns the exit status."""
    parser = ArgumentParser(prog="lightning_prune cache-latents", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML with `data` and the options below; later files win")
    parser.add_subclass_arguments(DataModule, "data", required=True, help="where pictures and captions come from")
    parser.add_class_arguments(CacheSettings)
    config = parser.parse_args(list(args))
    # jsonargparse 4.49 gave the method a shorter name; the older one is there down to the oldest release supported.
    made = getattr(parser, "instantiate", parser.instantiate_classes)(config)
    settings = CacheSettings(**{key: getattr(made, key) for key in CacheSettings.__dataclass_fields__})
    made.data.prepare_data()
    writer = CacheWriter(made.data, settings, _source(config.data))
    with _progress() as progress:
        task = progress.add_task("encoding", total=writer.total)
        manifest = writer.write(lambda samples: progress.advance(task, samples))
    _report(manifest, settings.output)
    return 0


def _source(data: Any) -> dict[str, Any]:
    """What identifies the data: its class and those of its arguments that samples depend on."""
    arguments = {key: value for key, value in data.init_args.as_dict().items() if key not in _READING_ONLY}
    return {"class_path": data.class_path, "init_args": arguments}


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), refresh_per_second=2)


def _report(manifest: Manifest, output: str) -> None:
    counts = {split: sum(shard.samples for shard in shards) for split, shards in manifest.splits.items()}
    shape = "x".join(map(str, manifest.sample_shape))
    print(
        f"wrote {output}: " + ", ".join(f"{count} {split}" for split, count in counts.items()) + f" latents of {shape}"
    )
    if manifest.conditions:
        print(f"captions as {', '.join(manifest.conditions)}; the empty prompt is {output}/null_prompt.safetensors")
    if manifest.damaged:
        print(f"{len(manifest.damaged)} damaged pictures, others stand in: {', '.join(manifest.damaged[:5])}")
