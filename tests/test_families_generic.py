"""Every type of transformers whose experts use the fused interface, through the whole path.

docs/families.md is written by the same code (scripts/families).
"""

from pathlib import Path

import generic
import pytest
import torch
from safetensors.torch import save_file
from shrunk import CHANGES, config_of, discover, several_classes

from qmoe.errors import UnsupportedModelError
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint

# one of every shape: no gate, transposed, own gate function, text inside a multimodal model,
# experts between linear-attention blocks, layers that differ in width
FAST = ("nemotron_h", "aria", "deepseek_v4", "gemma4_text", "qwen3_5_moe", "lfm2_moe", "jamba")
PASSING = [kind for kind in discover() if kind not in generic.REASONS]


def _row(kind, tmp_path, tiny, table_row):
    row = generic.attempt(kind, tmp_path, tiny)
    table_row("fused", row)
    if row["reason"]:
        pytest.skip(row["reason"])
    assert tuple(row["passed"]) == generic.STEPS
    assert row["experts"]


@pytest.mark.parametrize("kind", FAST)
def test_fused_type(kind, tmp_path, tiny, table_row):
    _row(kind, tmp_path, tiny, table_row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in PASSING if k not in FAST])
def test_every_fused_type(kind, tmp_path, tiny, table_row):
    _row(kind, tmp_path, tiny, table_row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", generic.PUBLISHED)
def test_published_class(kind, tmp_path, tiny, table_row):
    row = generic.attempt_published(kind, tmp_path, tiny)
    table_row("fused", row)
    assert tuple(row["passed"]) == generic.STEPS


NO_TEXT = {  # the class that published checkpoints name
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
}


@pytest.mark.parametrize("kind", generic.REASONS)
def test_what_cannot_be_compressed(kind, tmp_path, tiny, table_row):
    """It is refused by its class, before any weight is read."""
    table_row("fused", generic.attempt(kind, tmp_path, tiny))
    config = config_of(kind)
    config.architectures = [NO_TEXT[kind]]
    config.save_pretrained(tmp_path / "source")
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="is not a language model"):
        StreamedModel(open_checkpoint(tmp_path / "source"))


def test_discovery_finds_the_interface():
    """What is listed is what transformers has; nothing that is excused has gone."""
    assert len(PASSING) > 60
    assert set(FAST) <= set(PASSING)
    assert set(generic.REASONS) <= set(discover())
    assert set(CHANGES) <= set(discover())
    assert set(several_classes()) <= set(generic.PUBLISHED)


def test_the_table_is_complete():
    """docs/families.md has a row for every type, and nothing failed in it."""
    text = (Path(__file__).parents[1] / "docs" / "families.md").read_text("utf-8")
    for kind in discover():
        assert f"| `{kind}` |" in text, f"run scripts/families: {kind} is not in docs/families.md"
