"""A small GPT: rotary positions, QK norm, RMS norm without parameters, relu² MLP, untied zero head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a :class:`GPT`. ``width`` must divide into ``heads`` heads of an even size."""

    depth: int = 4
    width: int = 256
    heads: int = 2
    sequence_length: int = 512  # the longest sequence, in tokens
    vocab: int = 256  # bytes

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "sequence_length", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"GPTConfig.width must be a multiple of 2 * heads = {2 * self.heads} (rotary positions turn "
                f"pairs within a head), got {self.width}"
            )


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_angles(length: int, head_size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each (length, head_size); see arXiv:2104.09864."""
    frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = repeat(angles, "t d -> t (two d)", two=2)  # (T, head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_size / 2) of ``x`` (B, heads, T, head_size) by their positions' angles."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with normed, rotated queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_q = nn.Linear(config.width, config.width, bias=False)
        self.c_k = nn.Linear(config.width, config.width, bias=False)
        self.c_v = nn.Linear(config.width, config.width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            linear(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for linear in (self.c_q, self.c_k, self.c_v)
        )  # (B, heads, T, head_size)
        # Normed after the turn or before is the same: the turn keeps lengths.
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Four times wider inside, relu²."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The whole model. Initialized from the global random stream: seed it for the same weights.

    >>> model = GPT(GPTConfig(depth=1, width=64))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        cos, sin = rotary_angles(config.sequence_length, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @classmethod
    def of_width(cls, depth: int, width: int, sequence_length: int) -> GPT:
        """With heads 128 wide, or one head if that is too wide."""
        heads = max(1, width // 128)
        return cls(GPTConfig(depth=depth, width=width, heads=heads, sequence_length=sequence_length))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with standard deviation 1/sqrt(fan_in); what writes into the stream starts at zero."""
        nn.init.normal_(self.embed.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("c_proj", "lm_head")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) of the next token, or with ``targets`` (B, T) their mean cross-entropy.

        Raises:
            ValueError: if there are more than ``config.sequence_length`` tokens.
        """
        T = tokens.size(1)
        if T > self.config.sequence_length:
            raise ValueError(f"{T} tokens are more than the sequence length {self.config.sequence_length}")
        cos, sin = self.cos[:T], self.sin[:T]
        x = norm(self.embed(tokens))  # (B, T, width)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.lm_head(norm(x)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: bytes, n: int) -> bytes:
        """The ``n`` most likely bytes after ``prompt``, one after the other (greedy, batch of one)."""
        if not prompt:
            raise ValueError("generate needs a prompt of at least one byte")
        tokens = torch.tensor([list(prompt)], device=self.embed.weight.device)  # (1, T)
        for _ in range(n):
            logits = self(tokens[:, -self.config.sequence_length :])
            tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())
