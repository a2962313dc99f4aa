"""From a `Prompt` to the tensors a model reads: the one path by which prompts and responses are tokenised.

Images whose size needs no resizing are cut into patches here, a whole batch at once; every other image goes
through the Hugging Face processor, to which the former is equal to 1e-6.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from prism_ray.models.tokens import made_of, writer_of
from prism_ray.models.turns import LaterImages, collapsed, continuation
from prism_ray.records import Prompt, Rollout
from prism_ray.response import piece_table

MARKER = "<image>"

_COMPOSED = 4
"""At most so many characters of a text become one when a tokenizer normalises it."""
_QUICK = 1
"""How hard PNG is to be compressed: higher levels take several times as long for a tenth less."""


class BadPrompt(ValueError):
    """A prompt that cannot be used; the message names it and says why."""


class PromptTooLong(BadPrompt):
    """A prompt with more tokens than the configured limit; it has (at least) `tokens`."""

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class BadImage(BadPrompt):
    """A prompt whose images do not decode, or do not match its `<image>` markers."""


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as a model reads it.

    `token_ids` int64 [P], image placeholders expanded, ending with the generation prompt; `pixel_values` float32
    [patches, 3·2·patch²] and `grid_thw` int64 [images, 3] as the Hugging Face processor gives them (0 rows without
    images); `position_ids` int64 [3, P] (time, height, width); `visual_spots` int64 [V] where the placeholders lie in
    `token_ids`. The first response token has position `next_position` in all three rows.
    """

    id: str
    token_ids: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    position_ids: Tensor
    visual_spots: Tensor

    @property
    def next_position(self) -> int:
        return int(self.position_ids.max()) + 1


class Encoder:
    """Tokenises prompts and responses for the model in `folder` (a Hugging Face folder with its processor).

    A prompt of more than `max_prompt_tokens` tokens (placeholders expanded) raises `PromptTooLong`. Token ids that came
    with a prompt are taken as they are if they are of its messages and of this folder's tokenizer and template, whose
    digest is `writer`; else they are computed.
    """

    def __init__(self, folder: str | Path, max_prompt_tokens: int) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no config.json; give the folder of a Hugging Face Qwen3-VL checkpoint")
        config = AutoConfig.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer: Any = self.processor.tokenizer
        self.writer = writer_of(folder)
        self.max_prompt_tokens = max_prompt_tokens
        self._image_token: str = self.processor.image_token
        self._image_id: int = config.image_token_id
        self._image_processor: Any = self.processor.image_processor
        self.end_id: int = self.tokenizer.eos_token_id
        pad_id = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad_id is None else pad_id
        self.pieces: list[bytes] = piece_table(self.tokenizer)
        self.banned_ids: list[int] = _banned_ids(config, self.tokenizer, self.end_id)
        self._token_characters = _COMPOSED * max(map(len, self.pieces))

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        """Encode one prompt."""
        return self.prompts([prompt])[0]

    def prompts(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode several prompts; the images of all of them are processed together."""
        short = [self._checked_ids(p) for p in prompts]
        pictures = [_picture(data, p.id, i) for p in prompts for i, data in enumerate(p.images)]
        patches, grids = self._patches(pictures)
        encoded, first = [], 0
        for prompt, ids in zip(prompts, short, strict=True):
            last = first + len(prompt.images)
            encoded.append(self._assemble(prompt, ids, patches[first:last], grids[first:last]))
            first = last
        return encoded

    def tokenised(self, prompt: Prompt) -> Prompt:
        """The prompt with its token ids, for every encoder of the same tokenizer and template."""
        ids = tuple(self._checked_ids(prompt))
        return replace(prompt, token_ids=ids, tokens_of=made_of(self.writer, prompt.messages))

    def length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, placeholders expanded: as many as `prompt` gives, from the images' sizes alone."""
        tokens = len(self._checked_ids(prompt))
        block = self._image_processor.patch_size * self._image_processor.merge_size
        for index, data in enumerate(prompt.images):
            with _opened(data, prompt.id, index) as image:
                height, width = self._fitting(image.height, image.width)
            tokens += height * width // block**2 - 1
        return tokens

    def fitted(self, prompt: Prompt) -> Prompt:
        """The prompt with every image at the size that the model sees it at, so that nobody later resizes it again: as
        PNG, which keeps the pixels that the image processor's own resizing gives. An image that has its size already
        keeps its bytes."""
        return replace(prompt, images=tuple(self._fitted(data, prompt.id, i) for i, data in enumerate(prompt.images)))

    def _fitted(self, data: bytes, prompt_id: str, index: int) -> bytes:
        with _opened(data, prompt_id, index) as image:
            if self._fitting(image.height, image.width) == (image.height, image.width):
                return data
        p = self._image_processor
        pixels = torch.from_numpy(_picture(data, prompt_id, index)).permute(2, 0, 1)[None]
        resized = p.resize(images=pixels, size=p.size, resample=p.resample, factor=p.patch_size * p.merge_size)
        buffer = io.BytesIO()
        picture = Image.fromarray(resized[0].permute(1, 2, 0).numpy())
        picture.save(buffer, "PNG", compress_level=_QUICK)
        return buffer.getvalue()

    def response(self, text: str) -> list[int]:
        """Token ids of a response's text and the end token: the path for references and supervised targets."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def engine_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as vLLM takes it: token ids with one placeholder for each image, and the images."""
        ids = self._checked_ids(prompt)
        images = [Image.fromarray(_picture(data, prompt.id, i)) for i, data in enumerate(prompt.images)]
        return {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {})

    def going_on(self, asked: dict[str, Any], begun: Rollout) -> dict[str, Any]:
        """An `engine_prompt` with the beginning of a response behind it, and the images that came with that."""
        ids = asked["prompt_token_ids"] + collapsed(begun.token_ids, self._image_id).tolist()
        if not begun.images:
            return asked | {"prompt_token_ids": ids}
        before = asked.get("multi_modal_data", {}).get("image", [])
        later = [Image.fromarray(_picture(data, begun.prompt_id, i)) for i, data in enumerate(begun.images)]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": [*before, *later]}}

    def answer(self, prompt_id: str, message: Mapping[str, str], images: Sequence[bytes], ended: bool) -> np.ndarray:
        """Tokens int32 of what stands between a response and the next: an environment's message, placeholders expanded.

        `ended` says whether the response's last token is the end token. BadImage where an image does not decode, or
        the message (with its text) holds another number of placeholders.
        """
        text = continuation(self._rendered, message, self.tokenizer.decode([self.end_id]), ended)
        ids = self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"], prompt_id, len(images))
        _, grids = self._patches([_picture(data, prompt_id, i) for i, data in enumerate(images)])
        return self._expanded(ids, grids).astype(np.int32)

    def later(self, prompt: EncodedPrompt, token_ids: np.ndarray, images: Sequence[bytes]) -> LaterImages:
        """The images within the response `token_ids` to a prompt; ValueError where they are not those of its tokens."""
        patches, grids = self._patches([_picture(data, prompt.id, i) for i, data in enumerate(images)])
        ids = collapsed(token_ids, self._image_id).astype(np.int64)
        starts = tuple(int(i) for i in np.flatnonzero(ids == self._image_id))
        if len(starts) != len(images) or not np.array_equal(self._expanded(ids, grids), token_ids):
            raise ValueError(
                f"prompt {prompt.id}: the image placeholders of a later turn are not those of its {len(images)} images"
            )
        positions = rope_positions(len(ids), starts, tuple(grids), self._image_processor.merge_size)
        return LaterImages(
            pixel_values=torch.cat(patches),
            grid_thw=torch.tensor(grids, dtype=torch.int64),
            visual_spots=torch.from_numpy(np.flatnonzero(token_ids == self._image_id)),
            position_ids=positions + prompt.next_position,
        )

    def _checked_ids(self, prompt: Prompt) -> list[int]:
        """Token ids with one placeholder for each image."""
        known = prompt.token_ids and prompt.tokens_of == made_of(self.writer, prompt.messages)
        ids = list(prompt.token_ids) if known else self._computed_ids(prompt)
        self._checked(ids, prompt.id, len(prompt.images))
        if len(ids) > self.max_prompt_tokens:
            raise self._too_long(prompt, len(ids))
        return ids

    def _computed_ids(self, prompt: Prompt) -> list[int]:
        least = sum(len(m["content"]) for m in prompt.messages) // self._token_characters
        if least > self.max_prompt_tokens:  # tokenising megabytes takes seconds
            raise self._too_long(prompt, least)
        return self.tokenizer(self._rendered(prompt.messages), add_special_tokens=False)["input_ids"]

    def _checked(self, ids: list[int], prompt_id: str, images: int) -> list[int]:
        markers = ids.count(self._image_id)
        if markers != images:
            raise BadImage(f"prompt {prompt_id}: {markers} {MARKER} markers but {images} images; give one for each")
        return ids

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        turns = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _expanded(self, ids: Sequence[int] | np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Token ids int64 in which each image's placeholder is there once for each of its visual tokens."""
        short = np.asarray(ids, np.int64)
        counts = np.ones(len(short), np.int64)
        counts[short == self._image_id] = [t * h * w // self._image_processor.merge_size**2 for t, h, w in grids]
        return np.repeat(short, counts)

    def _too_long(self, prompt: Prompt, tokens: int) -> PromptTooLong:
        limit = f"the limit of {self.max_prompt_tokens} tokens"
        message = f"prompt {prompt.id}: {tokens} tokens exceed {limit}; raise max_prompt_tokens or drop it"
        return PromptTooLong(message, tokens)

    def _assemble(self, prompt: Prompt, ids: list[int], patches: list[Tensor], grids: list[tuple]) -> EncodedPrompt:
        token_ids = self._expanded(ids, grids)
        if len(token_ids) > self.max_prompt_tokens:
            raise self._too_long(prompt, len(token_ids))
        starts = tuple(i for i, token in enumerate(ids) if token == self._image_id)
        positions = rope_positions(len(ids), starts, tuple(grids), self._image_processor.merge_size)
        width = 3 * self._image_processor.temporal_patch_size * self._image_processor.patch_size**2
        return EncodedPrompt(
            id=prompt.id,
            token_ids=torch.from_numpy(token_ids),
            pixel_values=torch.cat(patches) if patches else torch.zeros(0, width),
            grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
            position_ids=positions,
            visual_spots=torch.from_numpy(np.flatnonzero(token_ids == self._image_id)),
        )

    def _patches(self, pictures: list[np.ndarray]) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
        """Patches [n, 3·2·patch²] and grid (t, h, w) of each picture (uint8 [H, W, 3]), in the order given."""
        patches: list[Tensor] = [torch.empty(0)] * len(pictures)
        grids: list[tuple[int, int, int]] = [(0, 0, 0)] * len(pictures)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_shape.setdefault(picture.shape, []).append(index)
        for shape, members in by_shape.items():
            stack = np.stack([pictures[i] for i in members])
            if self._keeps_size(shape[0], shape[1]):
                size = self._image_processor.patch_size
                grid = (1, shape[0] // size, shape[1] // size)
                many = patchify(torch.from_numpy(stack), self._image_processor)
            else:
                done = self._image_processor(images=list(stack), return_tensors="pt", input_data_format="channels_last")
                grid = tuple(done["image_grid_thw"][0].tolist())
                many = done["pixel_values"].reshape(len(members), -1, done["pixel_values"].shape[-1])
            for index, one in zip(members, many, strict=True):
                patches[index], grids[index] = one, grid
        return patches, grids

    def _keeps_size(self, height: int, width: int) -> bool:
        p = self._image_processor
        plain = p.do_rescale and p.do_normalize and abs(p.rescale_factor * 255 - 1) < 1e-9
        if not plain or height % (p.patch_size * p.merge_size) or width % (p.patch_size * p.merge_size):
            return False
        return self._fitting(height, width) == (height, width)

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """The size that the image processor gives an image of this size. ValueError where it refuses it, or what comes
        of it, which may be narrower."""
        p = self._image_processor
        if not p.do_resize:
            return height, width
        limits = {"min_pixels": p.size["shortest_edge"], "max_pixels": p.size["longest_edge"]}
        size = smart_resize(height, width, p.patch_size * p.merge_size, **limits)
        smart_resize(*size, p.patch_size * p.merge_size, **limits)  # whoever gets it at that size asks again
        return size


def patchify(pictures: Tensor, processor: Any) -> Tensor:
    """Normalised patches float32 [N, patches, 3·t·p·p] of uint8 pictures [N, H, W, 3] of equal, fitting size.

    Order as in transformers' `Qwen2VLImageProcessor.patchify`: merge blocks row by row, patches inside a block, then
    channel, time (the picture repeated), row, column.
    """
    count, height, width, _ = pictures.shape
    size, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    mean = torch.tensor(processor.image_mean, dtype=torch.float32) * 255
    std = torch.tensor(processor.image_std, dtype=torch.float32) * 255
    pixels = (pictures.float() - mean) / std
    block = size * merge
    cut = pixels.reshape(count, height // block, merge, size, width // block, merge, size, 3)
    cut = cut.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return cut.reshape(count, (height // size) * (width // size), 3 * frames * size * size)


@lru_cache(maxsize=4096)
def rope_positions(length: int, starts: tuple[int, ...], grids: tuple[tuple[int, int, int], ...], merge: int) -> Tensor:
    """Position ids int64 [3, P] of a prompt: `length` tokens with one placeholder at each of `starts`.

    Equal to transformers' `Qwen3VLModel.get_rope_index` on the expanded prompt: text counts on in all three rows, an
    image spans its merged grid and moves the count by the longer side. Treat the result as read-only, it is shared.
    """
    parts, position, done = [], 0, 0
    for start, (t, h, w) in zip(starts, grids, strict=True):
        parts.append(_text_positions(position, start - done))
        position += start - done
        grid = torch.meshgrid(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
        parts.append(torch.stack(grid).reshape(3, -1) + position)
        position += max(h, w) // merge
        done = start + 1
    parts.append(_text_positions(position, length - done))
    return torch.cat(parts, dim=1)


def _text_positions(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)


def _parts(content: str) -> list[dict[str, str]]:
    """Chat-template parts of a content in which `<image>` stands for an image."""
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(MARKER)):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _picture(data: bytes, prompt_id: str, index: int) -> np.ndarray:
    """The picture as uint8 [H, W, 3]."""
    with _opened(data, prompt_id, index) as image:
        return np.array(image.convert("RGB"))


@contextmanager
def _opened(data: bytes, prompt_id: str, index: int) -> Iterator[Image.Image]:
    """An image of a prompt; BadImage for one that does not decode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Exception as error:  # PIL raises many types on damaged files, SyntaxError and struct.error among them
        reason = str(error).split("\n")[0] or type(error).__name__
        raise BadImage(f"prompt {prompt_id}: image {index} does not decode ({reason}); replace or drop it") from error


def _banned_ids(config: Any, tokenizer: Any, end_id: int) -> list[int]:
    """What a policy must never sample: special and vision tokens, and ids that stand for no token."""
    banned = set(tokenizer.all_special_ids)
    banned |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    banned |= {getattr(config, name) for name in names if getattr(config, name, None) is not None}
    banned |= set(range(len(tokenizer), config.get_text_config().vocab_size))
    return sorted(banned - {end_id})
