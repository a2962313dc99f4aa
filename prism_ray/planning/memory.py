"""How much memory training and sampling take: weights, gradients, optimiser, activations, keys and values.

Bytes, on one rank or engine. Weights, gradients and optimiser states are exact, because DeepSpeed's own rules decide
them; activations are an estimate, counted tensor by tensor from what the layers keep for their backward pass
(`benchmarks/memory_model.py` holds both against what is measured).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from prism_ray.config.learner import OptimiserSettings
from prism_ray.planning.architecture import Architecture

NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

CHUNK_LOGITS = 2**26
"""Logits that the learner holds at a time (`models.logprobs.CHUNK_ELEMENTS`; a test compares)."""

BUCKET_NUMBERS = 500_000_000
"""Gradients that DeepSpeed gathers before it sends them (its default `reduce_bucket_size`): with ZeRO it reserves a
buffer of as many numbers, whatever the size of the model."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and in its host's memory for it."""

    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    buffers: int = 0
    activations: int = 0
    kv_cache: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All that lies on the device at the same time."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "host")

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def training_state(total: int, trained: int, settings: OptimiserSettings, ranks: int) -> Memory:
    """What a rank holds between two updates, and at the end of a backward pass, without activations.

    `total` parameters, of which `trained` train. ZeRO's stages divide the optimiser (1), gradients too (2), weights too
    (3); with ZeRO, DeepSpeed keeps float32 copies of what trains, whatever the precision.
    """
    size, stage = NUMBER[settings.precision], settings.zero_stage
    mine = -(-trained // ranks)
    weights, gradients, buffers = total * size, trained * size, 0
    optimiser = (8 * trained) if stage == 0 else 12 * mine
    if stage >= 2:
        gradients = mine * size
    if stage:
        buffers = BUCKET_NUMBERS * size
    if stage == 3:
        weights = -(-total // ranks) * size
    host = 0
    if settings.offload != "none":
        # Gradients follow in float32, twice: as they come, and as the optimiser reads them.
        host, optimiser = optimiser + 8 * mine, 0
        gradients = 0 if stage == 2 else gradients
    if settings.offload == "parameters":
        host, weights = host + weights, 0
    return Memory(weights, gradients, optimiser, buffers, host=host)


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass as memory sees it."""

    tokens: int
    """Of the micro-batch, prompts and images included."""
    visual_tokens: int
    """Of those, how many are of images."""
    precision: str
    checkpointing: bool = False
    trains_vision: bool = True


def activations(model: Architecture, run: Pass) -> int:
    """Bytes that a training pass holds at its peak, beside the training state.

    With gradient checkpointing only the input of every layer is kept, and one layer is there in full while it is
    computed again.
    """
    size = NUMBER[run.precision]
    layer, entrance = _decoder_layer(model, size), model.hidden * size
    patches = run.visual_tokens * model.patches_per_token
    block, patch = _vision_block(model, size), model.vision_hidden * size
    if run.checkpointing:
        text = model.layers * entrance + layer
        vision = (model.vision_layers * patch + block) if run.trains_vision else block
    else:
        text, vision = model.layers * layer, (model.vision_layers if run.trains_vision else 1) * block
    deepstack = run.visual_tokens * model.deepstack * 2 * entrance
    return run.tokens * (text + 3 * entrance) + patches * vision + deepstack + logits(model, run.tokens, size)


def logits(model: Architecture, tokens: int, size: int) -> int:
    """Bytes of the output layer's chunk: logits, log-softmax, its gradient and that of the logits."""
    chunk = min(CHUNK_LOGITS, tokens * model.vocabulary)
    return chunk * (3 * 4 + (2 * size if size < 4 else 0))


def _norm(width: int, size: int) -> int:
    """A norm computes in float32: its input there (a copy unless it is float32 already) and the normed are kept."""
    return width * (2 * size + (4 if size < 4 else 0))


def _decoder_layer(model: Architecture, size: int) -> int:
    """Bytes a token of one decoder layer keeps for the backward pass."""
    h, query, kv = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    norms = 2 * _norm(h, size) + _norm(query + kv, size)
    attention = (2 * (query + kv) + kv + 2 * query) * size  # before and after the rotation, values, mixed, as one row
    mlp = 4 * model.mlp * size * (model.top_k if model.experts else 1)
    routed = 2 * h * size * model.top_k if model.experts else 0
    return norms + attention + mlp + routed + 2 * h * size  # and the two sums


def _vision_block(model: Architecture, size: int) -> int:
    """Bytes a patch of one vision block keeps."""
    v = model.vision_hidden
    return (2 * 2 * v + 3 * v + 4 * v + 2 * v + 2 * model.vision_mlp + 2 * v) * size


def judge_pass(model: Architecture, run: Pass) -> int:
    """Like `activations`, of a forward pass without gradients: one layer at a time, and the log-probs' chunk."""
    size = NUMBER[run.precision]
    patches = run.visual_tokens * model.patches_per_token
    chunk = min(CHUNK_LOGITS, run.tokens * model.vocabulary) * (4 + size)
    return (
        run.tokens * (_decoder_layer(model, size) + 3 * model.hidden * size)
        + patches * _vision_block(model, size)
        + chunk
    )


def kv_bytes(model: Architecture, dtype: str, tensor_parallel: int) -> int:
    """Bytes of the keys and values of one token on one GPU."""
    return model.kv_numbers * NUMBER[dtype] // min(tensor_parallel, model.kv_heads)
