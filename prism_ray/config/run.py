"""The configuration of a run: one field per room, composed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.corpora import CorporaSettings, SourceSettings, paths_of
from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LearnerSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.objective import VIEW_ESTIMATORS, ObjectiveSettings
from prism_ray.config.report import ReportSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings, JournalSettings
from prism_ray.config.served import ServedSettings
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
    """Folder that holds the runs. A job of `ray job submit` works in a copy that is deleted after it, so for it a
    relative path is in PRISM_RAY_HOME, a folder that all nodes share, or else in `~/prism_ray`."""
    seed: int = 0
    """Seed of corpora, initial weights, order and sampling."""
    stages: list[StageName] = list(STAGES)
    """Stages to run, in any order; what one needs and is missing or out of date runs first."""
    policy: Path | None = None
    """Hugging Face folder of the starting policy. Unset: the testbed's own tiny base model is built and trained."""
    system_prompt: str = ""
    """System turn that the chat template of every checkpoint from SFT on writes where a conversation has none. Give the
    one that your prompts carry: other programs' runners send the question alone."""
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
    served: ServedSettings = ServedSettings()
    """The endpoint that judges where `align.judge` or `rlvr.judge` is `serve`."""
    journal: JournalSettings = JournalSettings()
    """Where judged trajectories are kept."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""
    report: ReportSettings = ReportSettings()
    """Metrics and report."""

    @model_validator(mode="after")
    def _weights_can_travel(self) -> Self:
        way = self.rollout.weights
        without = [
            f"{name} is 0"
            for name, gpus in (
                ("rollout.gpus_per_engine", self.rollout.gpus_per_engine),
                ("learner.gpus_per_rank", self.learner.gpus_per_rank),
            )
            if not gpus
        ]
        if way not in ("shared_memory", "gloo") and without:
            raise ValueError(
                f"rollout.weights: {way} carries weights between GPUs, but {' and '.join(without)}; "
                "set it to shared_memory or gloo"
            )
        if way == "ipc" and self.cluster.layout != "colocated":
            raise ValueError(
                "rollout.weights: ipc works within a GPU that a learner rank and an engine share, but cluster.layout "
                f"is {self.cluster.layout}: each has its own; set it to colocated, or rollout.weights to nccl"
            )
        return self

    @model_validator(mode="after")
    def _served_somewhere(self) -> Self:
        asking = [name for name, phase in (("align", self.align), ("rlvr", self.rlvr)) if phase.judge == "serve"]
        if asking and not self.served.url:
            raise ValueError(f"{asking[0]}.judge is serve but served.url is empty; give the endpoint's address")
        return self

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

    @model_validator(mode="after")
    def _gate_reaches_the_policy(self) -> Self:
        judge, align = self.discriminator, self.align
        gating = "gate" if judge.gate else "guard's freeze_policy" if judge.guard.may("freeze_policy") else ""
        if not gating:
            return self
        estimator = align.advantage.estimator
        if estimator == "prism_paper":
            why = "prism_paper normalises the sum of the views, which undoes"
        elif estimator not in VIEW_ESTIMATORS:
            why = f"{estimator} sees a response's reward alone, which passes by"
        elif align.judge == "serve":
            raise ValueError(
                f"align.judge is serve, a judge that does not learn and is not watched, so discriminator.{gating} does "
                "nothing; unset that, or let the run judge by itself"
            )
        else:
            return self
        raise ValueError(
            f"align.advantage.estimator {why} discriminator.{gating}; set prism_code or bounded_views, or unset that"
        )

    @model_validator(mode="after")
    def _verdicts_are_as_new_as_asked(self) -> Self:
        judge, most = self.discriminator, self.align.loop.max_judge_lag
        if self.align.judge == "own" and judge.scorers and judge.max_scorer_lag > most:
            raise ValueError(
                f"align.loop.max_judge_lag is {most} but discriminator.max_scorer_lag lets scorers judge with weights "
                f"that are {judge.max_scorer_lag} updates old; lower that, or raise align.loop.max_judge_lag"
            )
        return self

    @model_validator(mode="after")
    def _colocated(self) -> Self:
        """Engine and learner rank share a GPU and take turns: what does not fit that is refused here."""
        if self.cluster.layout == "split":
            return self
        why = "in the colocated layout (cluster.layout) "
        r, t = self.rollout, self.learner
        for name, phase in (("align", self.align), ("rlvr", self.rlvr)):
            if phase.loop.max_staleness:
                raise ValueError(
                    f"{why}engines sleep while the learner trains, so {name}.loop.max_staleness = "
                    f"{phase.loop.max_staleness} cannot be had; set it to 0, or cluster.layout to split"
                )
        if t.ranks != r.engines:
            raise ValueError(
                f"{why}every learner rank shares its GPU with an engine, but learner.ranks is {t.ranks} and "
                f"rollout.engines {r.engines}; make them equal"
            )
        if r.gpus_per_engine > 1 or r.gpus_per_engine != t.gpus_per_rank:
            raise ValueError(
                f"{why}rollout.gpus_per_engine and learner.gpus_per_rank must both be 1 (or 0, on CPUs), but they are "
                f"{r.gpus_per_engine} and {t.gpus_per_rank:g}"
            )
        if not r.sleep_level:
            raise ValueError(f"{why}engines must be able to sleep; set rollout.sleep_level to 1 or 2")
        if r.gpus_per_engine and r.kv_cache_gb is None:
            raise ValueError(
                f"{why}rollout.kv_cache_gb must be a number: unset, vLLM would take the memory that the learner keeps"
            )
        return self

    def named_paths(self) -> dict[str, list[Path]]:
        """The files and folders of the user's own that the configuration names, by setting."""
        models = {"policy": self.policy, "discriminator.policy": self.discriminator.policy}
        named = {setting: [path] for setting, path in models.items() if path is not None}
        return named | {f"data.{corpus}": paths_of(sources) for corpus, sources in self.data if sources}
