"""The configuration of a run: one field per room, composed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.corpora import CorporaSettings, SourceSettings
from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LearnerSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.objective import ObjectiveSettings
from prism_ray.config.report import ReportSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings, JournalSettings
from prism_ray.config.stages import EvaluateSettings, PhaseSettings, RlvrSettings, WarmupSettings
from prism_ray.config.supervised import BaseSettings, SftSettings, SupervisedSettings
from prism_ray.config.testbed import TestbedSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.config.verify import VerifySettings

StageName = Literal["base", "sft", "warmup", "align", "rlvr", "rlvr-sft", "references", "rlvr-references", "evaluate"]
STAGES: tuple[StageName, ...] = (
    "base", "sft", "warmup", "align", "rlvr", "rlvr-sft", "references", "rlvr-references", "evaluate",
)  # fmt: skip


class DataSettings(Settings):
    """The user's own corpora: paths of Parquet, JSON Lines or JSON files or of folders of them, or a path with its
    format, columns and image folder. Unset: the testbed makes them."""

    sft: list[Path | SourceSettings] = []
    """Demonstrations for SFT: needs `teacher_response`."""
    align: list[Path | SourceSettings] = []
    """Prompts with references for warm-up and alignment."""
    warmup: list[Path | SourceSettings] = []
    """Warm-up pairs (`question`, `image`, `teacher_caption`, `teacher_cot`, `student_caption`, `student_cot`), such as
    `jobs/curate.py` writes. Unset: the policy's own rollouts of `align`, which match what the judge will meet."""
    rlvr: list[Path | SourceSettings] = []
    """Prompts with verifiable answers."""
    evaluate: list[Path | SourceSettings] = []
    """Held-out prompts."""


class RunSettings(Settings):
    """A run of `jobs/align.py`."""

    name: str = Field(default="tiny", min_length=1, pattern=r"^[\w.-]+$")
    """Name of the run; its folder is `runs/<name>`. The same name again continues where the run ended."""
    runs: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of corpora, initial weights, order and sampling."""
    stages: list[StageName] = list(STAGES)
    """Stages to run, in any order; what one needs and is missing or out of date runs first."""
    policy: Path | None = None
    """Hugging Face folder of the starting policy. Unset: the testbed's own tiny base model is built and trained."""
    data: DataSettings = DataSettings()
    """Corpora of your own."""
    testbed: TestbedSettings = TestbedSettings()
    """The synthetic task, used where `data` is unset."""
    model: TinyModelSettings = TinyModelSettings()
    """The tiny model, used where `policy` is unset."""
    corpora: CorporaSettings = CorporaSettings()
    """How corpora are read and checked."""
    trainer: TrainerSettings = TrainerSettings()
    """How the supervised stages are run."""
    base: BaseSettings = BaseSettings()
    """Training of the testbed's base model."""
    sft: SftSettings = SftSettings()
    """Supervised fine-tuning."""
    references: SupervisedSettings = SupervisedSettings(steps=25, batch=128, lr=2e-4)
    """The control that the paper lacks: SFT on the references themselves, as many updates as alignment has."""
    warmup: WarmupSettings = WarmupSettings()
    """The discriminator's warm-up."""
    align: PhaseSettings = PhaseSettings()
    """Alignment."""
    rlvr: RlvrSettings = RlvrSettings()
    """RLVR, in every arm."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Evaluation."""
    rollout: RolloutSettings = RolloutSettings()
    """Rollout engines."""
    learner: LearnerSettings = LearnerSettings()
    """Learner group."""
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    """Discriminator."""
    verify: VerifySettings = VerifySettings()
    """Verifier of RLVR."""
    journal: JournalSettings = JournalSettings()
    """Where judged trajectories are kept."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""
    report: ReportSettings = ReportSettings()
    """Metrics and report."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        untouched = ObjectiveSettings().max_response_tokens
        for name, phase in (("align", self.align), ("rlvr", self.rlvr)):
            limit, most = phase.response_limit(self.rollout), self.rollout.max_response_tokens
            if limit > most:
                raise ValueError(
                    f"{name}.max_response_tokens is {limit} but the engines leave room for rollout.max_response_tokens "
                    f"= {most}; raise that (and rollout.max_model_len)"
                )
            if phase.objective.max_response_tokens not in (untouched, limit):
                raise ValueError(
                    f"{name}.objective.max_response_tokens is {phase.objective.max_response_tokens} but the stage sets "
                    f"it to the longest response, {limit}; remove it, or set {name}.max_response_tokens"
                )
        return self
