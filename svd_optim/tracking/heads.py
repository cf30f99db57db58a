"""Which layers are heads: from the last features to logits or targets, trained dense.

A head is known by what it does, or by its name where its place or its shape bears the name out: ``output`` beside
all other layers, not ``blocks.0.attn.output``. Of what is repeated in a stack only names count that can't mean
anything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

# Parts of a name that others put around a layer: torch.compile, DataParallel, FSDP, checkpoint_wrapper, PEFT.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
COPIES = "modules_to_save"  # PEFT's; the part behind it is an adapter's name
# Llama, Whisper, BERT and recurrent language models, x-transformers, the Annotated Transformer, fairseq, Megatron.
NAMES = frozenset({"output", "output_layer", "output_projection", "proj_out", "decoder", "to_logits", "logits",
                   "lm_logits", "vocab_proj", "generator"})  # fmt: skip
EXPANDS = 4  # so many times as many outputs as inputs, outside of a stack, is a head's shape


def own_parts(name: str) -> list[str]:
    """The parts of a layer's name without what wrappers have added."""
    parts: list[str] = []
    copies = False
    for part in name.split("."):
        if not copies and part not in WRAPPERS and part != COPIES:
            parts.append(part)
        copies = part == COPIES
    return parts


def find_heads(model: nn.Module) -> dict[nn.Module, str]:
    """The heads among the linear layers of a model, each with what it was known by."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tables = {m.num_embeddings: name for name, m in reversed([*model.named_modules()]) if isinstance(m, nn.Embedding)}
    alike = Counter(map(_without_numbers, linear))
    last = next(reversed(linear), None)
    heads: dict[nn.Module, str] = {}
    for name, module in linear.items():
        by = _called_head(name)
        if not by and alike[_without_numbers(name)] == 1:
            by = _by_vocabulary(module, tables, name == last) or _by_name(name, module, linear)
        if by:
            heads[module] = by
    return heads


def _without_numbers(name: str) -> str:
    """The same for what stands at the same place in the layers of a stack."""
    stack, dot, last = name.rpartition(".")
    return re.sub(r"\d+", "*", stack) + dot + last


def _called_head(name: str) -> str:
    """Names that say it themselves, wherever they stand."""
    parts = own_parts(name)
    if parts and parts[-1].endswith("head"):
        return f"it is called {parts[-1]!r}"
    said = next((part for part in parts if part == "head" or "classifier" in part), "")
    return f"it is part of {said!r}" if said else ""


def _by_vocabulary(module: nn.Linear, tables: dict[int, str], last: bool) -> str:
    """One output for each row of an embedding: the last layer, or one that widens to the largest table."""
    out = module.out_features
    if out not in tables or not (last or (out == max(tables) and out > module.in_features)):
        return ""
    return f"out_features = {out} is the vocabulary of {tables[out] or 'the embedding'}"


def _by_name(name: str, module: nn.Linear, others: Iterable[str]) -> str:
    """A head's name on a layer that stands beside all others, or has a head's shape."""
    parts = own_parts(name)
    if not parts or parts[-1] not in NAMES:
        return ""
    if module.out_features >= EXPANDS * module.in_features:
        return f"it is called {parts[-1]!r}, and out_features = {module.out_features} is what heads have"
    place = parts[:-1]
    beside_all = all(own_parts(other)[: len(place)] == place for other in others)
    return f"it is called {parts[-1]!r}, beside all other layers" if beside_all else ""
