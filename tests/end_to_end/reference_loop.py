"""The executable specification: PRISM alignment and GRPO in one synchronous file of plain PyTorch.

No Ray, no DeepSpeed, no vLLM, no batching: one sequence at a time through Hugging Face models. Who wants to know what
the distributed system computes reads this file; `test_reference.py` shows that the system at `max_staleness: 0`, given
the same rollouts, ends with the same losses and the same weights.

One alignment step: sample n responses to each prompt -> the discriminator scores each response's caption and its
think + answer (and the reference's) -> rewards -> group-normalised advantages -> one policy step; and one Bradley-Terry
step of the discriminator on the same responses. GRPO is the same with a verifier's reward and no discriminator.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FORMAT = re.compile(r"\s*(<caption>.*</caption>)\s*(<think>.*</think>\s*<answer>.*</answer>)\s*", re.DOTALL)
TAGS = [f"<{slash}{tag}>" for tag in ("caption", "think", "answer") for slash in ("", "/")]
VIEWS = ("perception", "reasoning")


@dataclass
class Question:
    """One prompt: the text after the image, the encoded image, the teacher's response, the verifier's reward."""

    text: str
    image: bytes
    reference: str
    reward: Callable[[str], float]


@dataclass
class Response:
    """One sampled response: its tokens, their log-probs when sampled, its text."""

    tokens: list[int]
    behaviour: Tensor
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    reference_scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Settings:
    """What the specification needs to know; the defaults are the product's."""

    temperature: float = 1.0
    judge_temperature: float = 3.0
    invalid_offset: float = 0.1
    truncation: float = 2.0
    head_weight: float = 1.0
    likelihood_weight: float = 0.5
    score_clip: float = 10.0
    score_reg: float = 1e-3
    rollouts_per_update: int = 4
    grad_clip: float = 1.0


def split(text: str) -> tuple[str, str] | None:
    """(caption, think + answer) with their tags, or None if the format is broken."""
    match = FORMAT.fullmatch(text)
    return match.groups() if match and all(text.count(tag) == 1 for tag in TAGS) else None


class Model:
    """A Hugging Face Qwen3-VL (dense or MoE) with its processor, one sequence at a time."""

    def __init__(self, network: torch.nn.Module, processor, banned: list[int] | None = None):
        self.network, self.processor, self.banned = network, processor, banned or []
        self.end = processor.tokenizer.eos_token_id

    def forward(self, question: Question, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Final hidden states [1, P + R, D] and logits [1, P + R, V] of the prompt followed by these tokens; and P."""
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(io.BytesIO(question.image)).convert("RGB")
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        self.prompt_length = inputs["input_ids"].shape[1]
        added = torch.tensor([tokens], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(tokens)))
        self.network.model.rope_deltas = None
        out = self.network(**inputs, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1], out.logits

    def logp(self, question: Question, tokens: list[int], temperature: float = 1.0) -> Tensor:
        """Log-probs [R] of these response tokens; tokens that may never be sampled are outside the softmax."""
        _, logits = self.forward(question, tokens)
        logits = logits[0, self.prompt_length - 1 : -1] / temperature
        if self.banned:
            logits = logits.index_fill(-1, torch.tensor(self.banned), float("-inf"))
        return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]

    @torch.no_grad()
    def sample(self, question: Question, n: int, limit: int, temperature: float, seed: int) -> list[Response]:
        """n responses of at most `limit` tokens."""
        generator, responses = torch.Generator().manual_seed(seed), []
        for _ in range(n):
            tokens: list[int] = []
            while len(tokens) < limit and tokens[-1:] != [self.end]:
                logits = self.forward(question, tokens)[1][0, -1] / temperature
                logits[self.banned] = float("-inf")
                tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            responses.append(Response(tokens, self.logp(question, tokens, temperature), text))
        return responses


def group_normalise(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6), std unbiased."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def grpo_advantages(question: Question, group: list[Response]) -> list[Tensor]:
    """One advantage for all tokens of a response."""
    advantages = group_normalise(torch.tensor([question.reward(r.text) for r in group]))
    return [a.expand(len(r.tokens)) for a, r in zip(advantages, group, strict=True)]


def prism_advantages(group: list[Response], policy: Model, s: Settings) -> list[Tensor]:
    """The caption's advantage on caption tokens, the reasoning's on the rest; an invalid response gets their mean."""
    per_view = []
    for view in VIEWS:
        valid = torch.tensor([bool(r.scores) for r in group])
        gap = torch.tensor([r.scores[view] - r.reference_scores[view] if r.scores else 0.0 for r in group])
        reward = torch.sigmoid(gap / s.judge_temperature)
        lowest = reward[valid].min() if valid.any() else torch.tensor(0.0)
        per_view.append(group_normalise(torch.where(valid, reward, lowest - s.invalid_offset)))
    advantages = []
    for index, response in enumerate(group):
        caption, reasoning = per_view[0][index], per_view[1][index]
        of_tokens = ((caption + reasoning) / 2).repeat(len(response.tokens))
        if response.scores:
            length = _caption_length(response, policy)
            of_tokens[:length], of_tokens[length:] = caption, reasoning
        advantages.append(of_tokens)
    return advantages


def _caption_length(response: Response, policy: Model) -> int:
    """How many tokens the caption takes: the shortest prefix whose text holds its closing tag."""
    decode = policy.processor.tokenizer.decode
    return next(k for k in range(len(response.tokens) + 1) if "</caption>" in decode(response.tokens[:k]))


class Judge:
    """The discriminator: score = head on the end token + likelihood_weight * log p(segment)."""

    def __init__(self, network: torch.nn.Module, head: torch.nn.Linear, processor, settings: Settings):
        self.model, self.head, self.s = Model(network, processor), head, settings

    def score(self, question: Question, response: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Score and clipped head output of each view; the reasoning is judged after the response's own caption."""
        caption, reasoning = split(response)
        tokenizer, scores, heads = self.model.processor.tokenizer, {}, {}
        context: list[int] = []
        for index, (view, text) in enumerate(zip(VIEWS, (caption, reasoning), strict=True)):
            segment = tokenizer(text, add_special_tokens=False)["input_ids"]
            hidden, logits = self.model.forward(question, [*context, *segment, self.model.end])
            start = self.model.prompt_length + len(context)
            logp = logits[0, start - 1 : start - 1 + len(segment)].log_softmax(-1)
            likelihood = logp.gather(-1, torch.tensor(segment)[:, None]).sum()
            heads[view] = self.head(hidden[0, -1])[index].clamp(-self.s.score_clip, self.s.score_clip)
            scores[view] = self.s.head_weight * heads[view] + self.s.likelihood_weight * likelihood
            context = context + segment
        return scores, heads

    @torch.no_grad()
    def judge(self, question: Question, group: list[Response]) -> None:
        """Write each valid response's scores and the reference's onto it."""
        reference = {v: float(x) for v, x in self.score(question, question.reference)[0].items()}
        for response in group:
            if split(response.text):
                scores = self.score(question, response.text)[0]
                response.scores = {v: float(x) for v, x in scores.items()}
                response.reference_scores = reference

    def loss(self, questions: list[Question], groups: list[list[Response]]) -> Tensor:
        """Bradley-Terry per view over the first valid rollouts of each group, and the head's mean square."""
        pair_losses: dict[str, list[Tensor]] = {v: [] for v in VIEWS}
        squares: list[Tensor] = []
        for question, group in zip(questions, groups, strict=True):
            chosen = [r for r in group if split(r.text)][: self.s.rollouts_per_update]
            if not chosen:
                continue
            teacher, teacher_heads = self.score(question, question.reference)
            for response in chosen:
                student, student_heads = self.score(question, response.text)
                for view in VIEWS:
                    pair_losses[view].append(-F.logsigmoid(teacher[view] - student[view]))
                    squares += [teacher_heads[view] ** 2, student_heads[view] ** 2]
        bradley_terry = sum(torch.stack(losses).mean() for losses in pair_losses.values())
        return bradley_terry + self.s.score_reg * torch.stack(squares).mean()


def policy_loss(
    policy: Model,
    questions: list[Question],
    groups: list[list[Response]],
    advantages: list[list[Tensor]],
    s: Settings,
) -> Tensor:
    """PPO's clipped loss, token-mean, weighted by min(proximal / behaviour, 2).

    A batch gets one step, so the proximal policy is the current one: the ratio is 1, the clip inactive, and only the
    gradient of the ratio remains.
    """
    total, count = torch.tensor(0.0), 0
    for question, group, of_group in zip(questions, groups, advantages, strict=True):
        for response, advantage in zip(group, of_group, strict=True):
            current = policy.logp(question, response.tokens, s.temperature)
            proximal = current.detach()
            ratio = (current - proximal).exp()
            weight = (proximal - response.behaviour).exp().clamp(max=s.truncation)
            total = total - (weight * ratio * advantage).sum()
            count += len(response.tokens)
    return total / count


def step(optimiser: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> None:
    """One clipped optimiser step."""
    optimiser.zero_grad()
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimiser.step()


def align_step(
    policy: Model,
    judge: Judge,
    optimiser: torch.optim.Optimizer,
    judge_optimiser: torch.optim.Optimizer,
    questions: list[Question],
    groups: list[list[Response]],
    s: Settings,
) -> tuple[float, float]:
    """One alignment step on sampled groups; returns (policy loss, discriminator loss). Scores come before updates."""
    for question, group in zip(questions, groups, strict=True):
        judge.judge(question, group)
    advantages = [prism_advantages(group, policy, s) for group in groups]
    loss = policy_loss(policy, questions, groups, advantages, s)
    judge_loss = judge.loss(questions, groups)
    step(judge_optimiser, judge_loss, s.grad_clip)
    step(optimiser, loss, s.grad_clip)
    return float(loss.detach()), float(judge_loss.detach())


def grpo_step(
    policy: Model,
    optimiser: torch.optim.Optimizer,
    questions: list[Question],
    groups: list[list[Response]],
    s: Settings,
) -> float:
    """One GRPO step on sampled groups; returns the loss."""
    advantages = [grpo_advantages(question, group) for question, group in zip(questions, groups, strict=True)]
    loss = policy_loss(policy, questions, groups, advantages, s)
    step(optimiser, loss, s.grad_clip)
    return float(loss.detach())
