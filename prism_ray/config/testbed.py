"""Settings of the testbed: what its images and questions look like, its teacher, its noise, its corpora."""

from __future__ import annotations

from pydantic import Field

from prism_ray.config.base import Settings


class NoiseSettings(Settings):
    """How the "public" SFT corpus is damaged. The defaults leave an SFT checkpoint that alignment can repair."""

    wrong_cells: float = Field(default=0.9, ge=0, le=1)
    """Share of captions in which cells are misread; the reasoning then follows the misread cells."""
    most_wrong_cells: int = Field(default=4, ge=1)
    """Up to how many cells are misread in such a caption (uniform from 1)."""
    truncated_caption: float = Field(default=0.55, ge=0, le=1)
    """Share of captions that stop after a random cell, as web captions leave things out."""
    wrong_reasoning: float = Field(default=0.5, ge=0, le=1)
    """Share of responses whose reasoning loses a cell or concludes wrongly; the answer follows it."""
    terse_think: float = Field(default=0.65, ge=0, le=1)
    """Share of responses that state results without the cells they come from."""


class TestbedSettings(Settings):
    """The synthetic multimodal task; every number that defines its corpora."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    rows: int = Field(default=2, ge=1, le=3)
    """Rows of the grid; 3 x 3 makes the reasoning too long for the tiny model."""
    columns: int = Field(default=3, ge=1, le=3)
    """Columns of the grid; one cell is one visual token of Qwen3-VL."""
    base_hardness: float = Field(default=1.0, gt=0)
    """Factor on pixel noise, colour jitter and position jitter of the clean text corpora the base model learns from."""
    hardness: float = Field(default=1.3, gt=0)
    """The same for everything else. Hard enough that perception is not free of errors; the vision pre-training uses it
    too, since features learned at 1.0 served badly here (greedy captions right .29)."""
    teacher_styles: int = Field(default=1, ge=1, le=3)
    """How many ways of writing (order, wording) the teacher mixes; 1 is the measured setting."""
    noise: NoiseSettings = NoiseSettings()
    """How the SFT corpus is damaged."""
    simple_questions: float = Field(default=0.4, ge=0, le=1)
    """Share of the clean corpus that asks about one colour or one cell: easier questions from which the model learns to
    read the picture and to list cells; the rest are "each" questions."""
    cell_questions: float = Field(default=0.15, ge=0, le=1)
    """Share of those that ask for a single cell."""
    pretrain: int = Field(default=4096, ge=1)
    """Images for the vision pre-training (labels of the cells, no text)."""
    base: int = Field(default=12000, ge=1)
    """Clean examples for the base model."""
    sft: int = Field(default=6144, ge=1)
    """Noisy examples on "each" questions: the broad public corpus."""
    align: int = Field(default=1024, ge=1)
    """Clean examples with references for the alignment."""
    rlvr: int = Field(default=1024, ge=1)
    """Prompts with a verifiable answer."""
    evaluate: int = Field(default=1024, ge=1)
    """Held-out prompts of the default family."""
    evaluate_unseen: int = Field(default=256, ge=1)
    """Held-out prompts of the family that no training split contains."""
