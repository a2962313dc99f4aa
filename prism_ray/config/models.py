"""Settings of the models room: the shape of the tiny Qwen3-VL that the testbed trains from scratch."""

from __future__ import annotations

from prism_ray.config.base import Settings


class TinyModelSettings(Settings):
    """A Qwen3-VL of about 0.76M parameters: small enough for a CPU, every part of the real architecture present."""

    hidden_size: int = 96
    """Width of the language model; 64 leaves too little room for six cells and three answers at once."""
    layers: int = 4
    """Decoder layers; with 3 the model learns much more slowly (measured)."""
    heads: int = 4
    """Query heads."""
    key_value_heads: int = 2
    """Key-value heads: fewer than query heads, so that grouped-query attention is really exercised."""
    head_dim: int = 32
    """Width of one head; the three sections of the multimodal rotary embedding must add up to half of it."""
    mlp_size: int = 192
    """Width of the gated MLP."""
    mrope_section: tuple[int, int, int] = (6, 5, 5)
    """How many rotary frequencies carry time, height and width."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; sequences are short, so the large base of the big models would be wasted."""
    max_positions: int = 512
    """Longest sequence the model declares; the engine refuses longer ones."""
    vision_hidden_size: int = 64
    """Width of the vision tower."""
    vision_depth: int = 2
    """Blocks of the vision tower; two, so that the first can feed deepstack and the second the merger."""
    vision_heads: int = 2
    """Heads of the vision tower."""
    vision_mlp_size: int = 128
    """Width of the vision tower's MLP."""
    vision_positions: int = 64
    """Learned position embeddings (a square grid, interpolated to each image's grid)."""
    deepstack: tuple[int, ...] = (0,)
    """Vision blocks whose output is added to the first decoder layers."""
    embedding_std: float = 0.02
    """Initial spread of token embeddings (tied to the output layer, so larger values make the first logits wild)."""
    vision_position_std: float = 0.2
    """Initial spread of the vision tower's position embeddings; at 0.02 patches are hard to tell apart."""
    min_pixels: int = 32 * 32
    """Smallest image the processor leaves alone (one visual token)."""
    max_pixels: int = 256 * 256
    """Largest image the processor leaves alone (64 visual tokens); larger ones are scaled down."""
