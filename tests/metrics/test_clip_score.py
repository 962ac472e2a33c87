"""CLIP score with a tiny random CLIP, against torchmetrics."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_prune.metrics.clip_score import ClipScorer
from lightning_prune.protocols import InputError

CAPTIONS = ["a shoe", "a coat", "shoe coat", "a a a"]


def pictures(count: int = 4) -> Tensor:
    shape = (count, 3, 40, 40)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers  # takes seconds

    path = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    size = {"shortest_edge": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 77, "eos_token_id": len(tokens) - 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(path, safe_serialization=True)
    return path


def test_pairs_score_their_clipped_cosine(folder: Path) -> None:
    scorer = ClipScorer(folder, batch_size=3)
    found = scorer.score(pictures(), CAPTIONS)
    inputs = scorer.processor(text=CAPTIONS, images=list(pictures()), return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = scorer.model(**inputs).logits_per_image.diagonal() / scorer.model.logit_scale.exp()
    expected = (100 * cosines).clamp(min=0)
    torch.testing.assert_close(found.influence + found.value, expected.double(), rtol=1e-4, atol=1e-4)
    assert found.value == pytest.approx(float(expected.mean()), abs=1e-4)


def test_bad_pairs(folder: Path) -> None:
    scorer = ClipScorer(folder)
    with pytest.raises(InputError, match=r"4 images \(at least two\) and 3 captions"):
        scorer.score(pictures(), CAPTIONS[:3])
    with pytest.raises(InputError, match="1 images"):
        scorer.score(pictures(1), CAPTIONS[:1])
    with pytest.raises(InputError, match="CLIP score takes uint8"):
        scorer.score(pictures().float(), CAPTIONS)


def test_a_folder_with_something_else(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a transformers CLIP"):
        ClipScorer(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        ClipScorer(tmp_path / "nothing")


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'lightning_prune\[text\]'"):
        ClipScorer(tmp_path)
