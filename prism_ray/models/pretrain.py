"""Vision pre-training of the tiny model: linear heads that read colour and digit off each visual token.

Without it the language model never finds out that the images carry digits (measured: chance after 10k examples).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_ray.models.vision import encode_images


class CellProbe(nn.Module):
    """Linear classifiers on the merged and the deepstack tokens; thrown away after the pre-training.

    `hidden_size` is the width of a visual token, `levels` the number of deepstack levels, `classes` the number of
    classes of each label (of the testbed: 3 colours, 9 digits).
    """

    def __init__(self, hidden_size: int, levels: int, classes: tuple[int, ...] = (3, 9)) -> None:
        super().__init__()
        self.classes = classes
        self.heads = nn.ModuleList(nn.Linear(hidden_size, sum(classes)) for _ in range(1 + levels))

    def forward(
        self, visual: nn.Module, pixel_values: Tensor, grid_thw: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss (cross-entropy summed over labels, averaged over tokens and levels) and accuracy.

        `labels` [tokens, len(classes)] in the order of the visual tokens. Accuracy is the share of tokens all of whose
        labels the head on the merged tokens gets right. Shapes of the images as in `encode_images`.
        """
        merged, deepstack = encode_images(visual, pixel_values, grid_thw)
        losses, right = [], torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        for level, (head, tokens) in enumerate(zip(self.heads, [merged, *deepstack], strict=True)):
            for column, logits in enumerate(head(tokens).split(self.classes, dim=-1)):
                losses.append(F.cross_entropy(logits, labels[:, column]))
                if level == 0:
                    right &= logits.argmax(-1) == labels[:, column]
        return torch.stack(losses).sum() / len(self.heads), right.float().mean()
