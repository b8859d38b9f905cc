"""FaRL's image encoder: a vision transformer, as in CLIP, trained on faces and their captions.

Source: Zheng et al., "General Facial Representation Learning in a Visual-Linguistic Manner", 2022;
Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; names as in the `state_dict` of
FaRL-Base-Patch16-LAIONFace20M-ep64.pth, whose part `visual.` this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.training.models.frozen.network import FrozenNetwork

SIDE, PATCH = 224, 16
# Heads that were trained to fill in hidden patches; the embedding needs none.
MASKED_MODELLING = ("visual.lm_transformer.", "visual.ln_lm.", "visual.lm_head.",
                    "visual.mask_token")  # fmt: skip


class FaRL(FrozenNetwork):
    """What a caption could say of a face: an embedding that it shares with words.

    Args:
        width, layers, heads: of the transformer; side, patch: of the picture and of its patches,
            px; embedding: its length.
    """

    NAME = "farl"
    INPUT = (1, 3, SIDE, SIDE)
    OUTPUTS = ("embedding",)

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        side: int = SIDE,
        patch: int = PATCH,
        embedding: int = 512,
    ) -> None:
        super().__init__()
        self.sizes = {"width": width, "layers": layers, "heads": heads, "side": side,
                      "patch": patch, "embedding": embedding}  # fmt: skip
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.zeros(width))
        tokens = (side // patch) ** 2 + 1
        self.visual.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.visual.proj = nn.Parameter(torch.zeros(width, embedding))
        self.visual.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.visual.ln_pre = nn.LayerNorm(width)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.Sequential(
            *(Block(width, heads) for _ in range(layers))
        )
        self.visual.ln_post = nn.LayerNorm(width)

    def config(self) -> dict[str, Any]:
        return dict(self.sizes)

    def forward(self, image: Tensor) -> Tensor:
        """The embedding: [N,E], not normalised.

        image: float32 [N,3,side,side], RGB, normalised as CLIP's
        """
        visual: Any = self.visual
        patches = visual.conv1(image).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(image), 1, -1)
        x = torch.cat([first, patches], dim=1) + visual.positional_embedding
        x = visual.transformer.resblocks(visual.ln_pre(x))
        embedding: Tensor = visual.ln_post(x[:, 0]) @ visual.proj
        return embedding

    @classmethod
    def from_published(cls, state: Mapping[str, Any]) -> Self:
        """The network from the file's `state_dict`; the words' encoder is only counted.

        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite.
        """
        return cls._load(state, {}, _spare)


class Block(nn.Module):
    """Attention and two linear layers, each on the norm of what it adds to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        # CLIP's cheaper stand-in for GELU
        return x + self.mlp["c_proj"](hidden * (1.702 * hidden).sigmoid())  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention of several heads; query, key and value in one matrix, in this order.

    Source: Vaswani et al., "Attention Is All You Need", 2017, Eq. 1.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        rows = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = rows.view(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.out_proj(seen.transpose(1, 2).reshape(count, tokens, width))
        return mixed


def _spare(name: str) -> str | None:
    if name.startswith(MASKED_MODELLING):
        return "heads of masked modelling"
    return None if name.startswith("visual.") else "encoder of words"
