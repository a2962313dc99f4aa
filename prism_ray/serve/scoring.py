"""A discriminator that is served: from queries to what is said of their responses, by the code that training scores
with."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_ray.config.views import shares_of
from prism_ray.discriminator.model import CARD_FILE, HEAD_FILE, Discriminator, load_discriminator
from prism_ray.discriminator.scorer import score_sequences, verdict_of
from prism_ray.discriminator.segments import ResponseViews, distinct, seen_prompts, view_sequences
from prism_ray.endpoint.wire import EndpointError, Preference, Scored, Span
from prism_ray.models.encode import BadImage, EncodedPrompt, Encoder, PromptTooLong
from prism_ray.records import Prompt
from prism_ray.response import parse
from prism_ray.serve.intake import Query


@dataclass(frozen=True, eq=False)
class Cut:
    """A query cut into sequences: those of its responses in their order, and of its reference; `cost` is at most how
    many tokens are computed for it."""

    query: Query
    responses: tuple[ResponseViews, ...]
    reference: ResponseViews | None
    cost: int


@dataclass(frozen=True)
class Said:
    """What is said of a query's responses, in their order, and of its reference if it has one."""

    results: tuple[Scored, ...]
    reference: Scored | None


class Served:
    """A discriminator loaded from its folder. `cut` and `score` may run in two threads."""

    def __init__(self, folder: str | Path, max_prompt_tokens: int, batch_tokens: int, cache_bytes: int) -> None:
        """Raises what `load_discriminator` raises: ValueError or FileNotFoundError with a sentence."""
        self.folder = Path(folder)
        self.version = version_of(self.folder)
        model = load_discriminator(self.folder)
        self.settings = model.settings.model_copy(update={"micro_batch_tokens": batch_tokens})
        model.settings = self.settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Discriminator = model.to(device, getattr(torch, self.settings.optimiser.precision)).eval()
        self.encoder = Encoder(self.folder, max_prompt_tokens)
        self.shares = shares_of(self.settings.views)
        self.needs_reference = any(view.context == "reference" for view in self.settings.views[1:])
        self._prompts = _PromptCache(cache_bytes)

    def cut(self, query: Query) -> Cut:
        """Tokenise a query; EndpointError 422 if its prompt or its reference cannot be used."""
        prompt = self._encoded(query.prompt)
        reference = None
        if query.prompt.reference:
            reference = view_sequences(prompt, query.prompt.reference, self.encoder, self.settings)
            if not reference.valid:
                raise EndpointError(422, "bad_reference", f"the reference cannot be judged: {reference.reason}")
        elif self.needs_reference:
            what = "a view of this discriminator is judged after the reference's earlier views; send `reference`"
            raise EndpointError(422, "reference_required", what)
        responses = tuple(view_sequences(prompt, t, self.encoder, self.settings, reference) for t in query.texts)
        every = [s for r in (*responses, *([reference] if reference else [])) for s in r.sequences.values()]
        cost = len(prompt.token_ids) + sum(len(s.token_ids) for s in distinct(every)[0])
        return Cut(query, responses, reference, cost)

    def score(self, cuts: Sequence[Cut]) -> list[Said]:
        """What is said of queries that this discriminator cut, all of them scored together."""
        responses = [r for cut in cuts for r in (*cut.responses, *([cut.reference] if cut.reference else []))]
        scores = iter(score_sequences(self.model, [s for r in responses for s in r.sequences.values()]).tolist())
        found = iter([{view: next(scores) for view in r.sequences} for r in responses])
        said = []
        for cut in cuts:
            own = [next(found) for _ in cut.responses]
            theirs = next(found) if cut.reference else None
            texts = zip(cut.responses, cut.query.texts, own, strict=True)
            results = tuple(self._scored(views, text, scores, theirs) for views, text, scores in texts)
            reference = None
            if cut.reference and theirs is not None:
                reference = self._scored(cut.reference, cut.query.prompt.reference, theirs, None)
            said.append(Said(results, reference))
        return said

    def combined(self, scores: dict[str, float]) -> float:
        """The mean of the views' scores, weighted as in training."""
        return sum(share * scores[view] for view, share in self.shares.items())

    def _scored(
        self, views: ResponseViews, text: str, scores: dict[str, float], reference: dict[str, float] | None
    ) -> Scored:
        reward = None
        if reference is not None:
            reward = verdict_of(views, scores, reference, self.settings, 0).reward
        if not views.valid:
            return Scored(valid=False, fault=views.fault, reason=views.reason, reward=reward)
        combined, gap = self.combined(scores), None
        if reference is not None:
            gap = {view: reference[view] - score for view, score in scores.items()}
            gap["combined"] = self.combined(reference) - combined
        spans = self._spans(views, text)
        return Scored(valid=True, scores=scores, combined=combined, spans=spans, gap=gap, reward=reward)

    def _spans(self, views: ResponseViews, text: str) -> dict[str, Span]:
        data = text.encode(errors="replace")
        spans = {}
        for view, (low, high) in parse(text, self.settings.views).spans.items():
            start = len(data[:low].decode(errors="replace"))
            stop = start + len(data[low:high].decode(errors="replace"))
            spans[view] = Span(start=start, stop=stop, cut=views.sequences[view].cut)
        return spans

    def _encoded(self, prompt: Prompt) -> EncodedPrompt:
        key = _digest(prompt)
        if (known := self._prompts.get(key)) is not None:
            return known
        try:
            encoded = seen_prompts([prompt], self.encoder, self.settings)[0]
        except PromptTooLong as error:
            what = f"{str(error).split(';')[0]}; shorten the prompt or send smaller images"
            raise EndpointError(422, "prompt_too_long", what) from None
        except BadImage as error:
            raise EndpointError(422, "bad_image", str(error)) from None
        except ValueError as error:  # of the image processor: an image a thousand times as wide as high, say
            raise EndpointError(422, "bad_prompt", f"the prompt cannot be encoded: {error}") from None
        self._prompts.put(key, encoded)
        return encoded


def preference(first: Scored, second: Scored) -> Preference:
    """How much rather the first response than the second (`wire.Preference`)."""
    if first.combined is None or second.combined is None:
        certain = None if first.valid == second.valid else float(first.valid)
        return Preference(views={}, combined=certain)
    views = {view: _sigmoid(score - second.scores[view]) for view, score in first.scores.items()}
    return Preference(views=views, combined=_sigmoid(first.combined - second.combined))


def version_of(folder: str | Path) -> str:
    """Names what a discriminator has learned: a digest of its card and its head, which every update changes.

    FileNotFoundError where there is none.
    """
    digest = hashlib.sha256()
    for name in (CARD_FILE, HEAD_FILE):
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a trained discriminator")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sigmoid(x: float) -> float:
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def _digest(prompt: Prompt) -> bytes:
    digest = hashlib.sha256(repr(prompt.messages).encode(errors="replace"))
    for image in prompt.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.digest()


class _PromptCache:
    """Prompts encoded lately, up to so many bytes. Equal prompts are one object, so that they share their computation
    in a batch."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes, self._lock = most_bytes, 0, threading.Lock()
        self._known: OrderedDict[bytes, tuple[EncodedPrompt, int]] = OrderedDict()

    def get(self, key: bytes) -> EncodedPrompt | None:
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][0]

    def put(self, key: bytes, prompt: EncodedPrompt) -> None:
        tensors = (prompt.token_ids, prompt.pixel_values, prompt.position_ids, prompt.visual_spots)
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            self._known[key] = prompt, size
            self._bytes += size
            while self._bytes > self._most:
                _, (_, old) = self._known.popitem(last=False)
                self._bytes -= old
