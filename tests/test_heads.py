"""Heads are left alone, whatever they are called, and nothing else is: on the module names of known architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.console import read_log
from svd_optim.tracking.heads import find_heads, own_parts
from svd_optim.tracking.selection import select_layers

Shapes = dict[str, tuple[int, int]]


def built(linear: Shapes, tables: Shapes) -> nn.Module:
    """A model of these nn.Linear (out, in) and nn.Embedding (rows, width), in this order, without values."""
    model = nn.Module()
    for name, (a, b) in (tables | linear).items():
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        kind: Any = nn.Embedding(a, b, device="meta") if name in tables else nn.Linear(b, a, device="meta")
        parent.add_module(last, kind)
    return model


def stack(prefix: str, depth: int = 2, **shapes: tuple[int, int]) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(depth) for name, shape in shapes.items()}


def block(d: int, *names: str, **more: tuple[int, int]) -> Shapes:
    """Layers of (d, d), and others."""
    return dict.fromkeys(names, (d, d)) | {name.replace("__", "."): shape for name, shape in more.items()}


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA = stack(
    "model.layers", **block(512, *ATTENTION), **block(0, mlp__up_proj=(1376, 512), mlp__down_proj=(512, 1376))
)
BERT = block(768, "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             intermediate__dense=(3072, 768), output__dense=(768, 3072))  # fmt: skip
BERT_TABLES = {"bert.embeddings.word_embeddings": (30522, 768), "bert.embeddings.position_embeddings": (512, 768),
               "bert.embeddings.token_type_embeddings": (2, 768)}  # fmt: skip
T5 = block(512, "layer.0.SelfAttention.q", "layer.0.SelfAttention.o", layer__1__DenseReluDense__wi_0=(1024, 512),
           layer__1__DenseReluDense__wo=(512, 1024))  # fmt: skip
WHISPER = block(384, "self_attn.q_proj", "self_attn.out_proj", fc1=(1536, 384), fc2=(384, 1536))
NANO = block(384, "attn.c_proj", attn__c_attn=(1152, 384), mlp__c_fc=(1536, 384), mlp__c_proj=(384, 1536))
ANNOTATED = block(512, *(f"self_attn.linears.{i}" for i in range(4)), feed_forward__w_1=(2048, 512),
                  feed_forward__w_2=(512, 2048))  # fmt: skip
META_LLAMA = block(512, "attention.wq", "attention.wo", feed_forward__w1=(1536, 512), feed_forward__w2=(512, 1536))
X_TRANSFORMER = {"0.1.to_q": (512, 256), "0.1.to_out": (256, 512), "1.1.ff.0.0": (1024, 256), "1.1.ff.2": (256, 1024)}
NEOX = block(512, "attention.dense", attention__query_key_value=(1536, 512), mlp__dense_h_to_4h=(2048, 512))
VIT = block(768, "attn.proj", attn__qkv=(2304, 768), mlp__fc1=(3072, 768), mlp__fc2=(768, 3072))

# name -> (linear layers that are tracked, heads with a word of the reason, embeddings)
ARCHITECTURES: dict[str, tuple[Shapes, dict[str, tuple[tuple[int, int], str]], Shapes]] = {
    "nanoGPT": (
        stack("transformer.h", **NANO),
        {"lm_head": ((65, 384), "called 'lm_head'")},
        {"transformer.wte": (65, 384), "transformer.wpe": (256, 384)},
    ),
    "nanoGPT, one block as wide as its positions": (
        stack("transformer.h", 1, **NANO),
        {"lm_head": ((50304, 384), "called 'lm_head'")},
        {"transformer.wte": (50304, 384), "transformer.wpe": (1536, 384)},
    ),
    "GPT-2 by other names": (
        stack("h", **block(768, "attn.output", mlp__fc=(3072, 768), mlp__output=(768, 3072))),
        {"to_vocab": ((50257, 768), "50257 is the vocabulary of wte")},
        {"wte": (50257, 768), "wpe": (1024, 768)},
    ),
    "Llama": (LLAMA, {"lm_head": ((32000, 512), "called")}, {"model.embed_tokens": (32000, 512)}),
    "Llama of its authors": (
        stack("layers", **META_LLAMA),
        {"output": ((32000, 512), "vocabulary of tok_embeddings")},
        {"tok_embeddings": (32000, 512)},
    ),
    "Llama, as a part without its embedding": (
        stack("layers", **META_LLAMA), {"output": ((500, 512), "beside all other layers")}, {},
    ),
    "BERT": (
        stack("bert.encoder.layer", **BERT) | {"cls.predictions.transform.dense": (768, 768)},
        {"cls.predictions.decoder": ((30522, 768), "vocabulary of bert.embeddings.word_embeddings")},
        BERT_TABLES,
    ),
    "BERT, padded vocabulary": (
        stack("bert.encoder.layer", **BERT), {"cls.predictions.decoder": ((30528, 768), "called 'decoder'")},
        BERT_TABLES,
    ),
    "BERT, classifying": (
        stack("bert.encoder.layer", **BERT) | {"bert.pooler.dense": (768, 768)},
        {"classifier": ((100, 768), "part of 'classifier'")},
        BERT_TABLES,
    ),
    "T5": (
        stack("encoder.block", **T5) | stack("decoder.block", **T5),
        {"lm_head": ((32128, 512), "called")},
        {"shared": (32128, 512), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": (32, 8)},
    ),
    "ViT of timm": (stack("blocks", **VIT), {"head": ((1000, 768), "called 'head'")}, {}),
    "ViT of torchvision": (
        {f"encoder.layers.encoder_layer_{i}.mlp.{j}": (768, 768) for i in range(2) for j in (0, 3)},
        {"heads.head": ((1000, 768), "called 'head'")},
        {},
    ),
    "Whisper": (
        stack("model.encoder.layers", **WHISPER) | stack("model.decoder.layers", **WHISPER),
        {"proj_out": ((51865, 384), "vocabulary of model.decoder.embed_tokens")},
        {"model.encoder.embed_positions": (1500, 384), "model.decoder.embed_tokens": (51865, 384),
         "model.decoder.embed_positions": (448, 384)},
    ),
    "LSTM language model": ({}, {"decoder": ((33278, 200), "vocabulary of encoder")}, {"encoder": (33278, 200)}),
    "Annotated Transformer": (
        stack("encoder.layers", **ANNOTATED) | stack("decoder.layers", **ANNOTATED),
        {"generator.proj": ((6384, 512), "vocabulary of tgt_embed.0.lut")},
        {"src_embed.0.lut": (8316, 512), "tgt_embed.0.lut": (6384, 512)},
    ),
    "x-transformers": (
        {f"attn_layers.layers.{name}": shape for name, shape in X_TRANSFORMER.items()},
        {"to_logits": ((256, 256), "vocabulary of token_emb.emb")},
        {"token_emb.emb": (256, 256)},
    ),
    "GPT-NeoX": (
        stack("gpt_neox.layers", **NEOX), {"embed_out": ((50432, 512), "vocabulary of gpt_neox.embed_in")},
        {"gpt_neox.embed_in": (50432, 512)},
    ),
    "Megatron": (
        stack("transformer.encoder.layers", **block(512, "self_attention.dense", mlp__dense_h_to_4h=(2048, 512))),
        {"transformer.output_layer": ((65024, 512), "vocabulary of")},
        {"transformer.embedding.word_embeddings": (65024, 512)},
    ),
    "PEFT": (
        {f"base_model.model.{name}.base_layer": shape for name, shape in LLAMA.items()},
        {"base_model.model.lm_head.modules_to_save.default": ((32000, 512), "called 'lm_head'")},
        {"base_model.model.model.embed_tokens": (32001, 512)},
    ),
    "compiled, in DataParallel": (
        {f"module.{name}": shape for name, shape in stack("layers", **META_LLAMA).items()},
        {"module.output._orig_mod": ((300, 512), "called 'output', beside all other layers")},
        {},
    ),
    "a value head beside it": (
        LLAMA, {"vocab_proj": ((32000, 512), "vocabulary"), "v_head": ((64, 512), "called 'v_head'")},
        {"model.embed_tokens": (32000, 512)},
    ),
    "in Lightning": (stack("net.blocks", **VIT), {"net.logits": ((100, 768), "beside all other layers")}, {}),
    # nothing in these is a head
    "regression": ({"layers.0": (64, 40), "layers.2": (64, 64), "layers.4": (40, 64)}, {}, {}),
    "regression in a row": ({"0": (64, 40), "2": (64, 64), "4": (40, 64)}, {}, {}),
    "regression on categories": ({"0": (64, 40), "2": (32, 64), "4": (40, 32)}, {}, {"categories": (32, 8)}),
    "a decoder that is a stack": (
        stack("encoder.layers", fc1=(2048, 512), fc2=(512, 2048)) | stack("decoder.layers", fc1=(2048, 512)), {}, {},
    ),
    "the outputs of attention and of adapters": (
        stack("blocks", **{"attn.output": (512, 512), "attn.decoder": (512, 512), "adapter.output": (512, 64)}), {}, {},
    ),
    "one block": ({"attn.query": (512, 512), "attn.output": (512, 512), "mlp.up": (2048, 512)}, {}, {}),
    "encoder and decoder": (
        {"encoder.input": (64, 99), "encoder.output": (64, 64), "decoder.input": (64, 64), "decoder.output": (99, 64)},
        {}, {},
    ),
    "a trunk as wide as its positions": (
        stack("h", **block(1024, "attn.c_proj", mlp__c_proj=(1024, 4096))), {}, {"wpe": (1024, 1024)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_of_known_architectures_are_found(name: str) -> None:
    tracked, heads, tables = ARCHITECTURES[name]
    model = built(tracked | {head: shape for head, (shape, _) in heads.items()}, tables)
    found = select_layers(model, [{"params": list(model.parameters())}], SubspaceConfig())
    assert [layer.name for layer in found.layers] == list(tracked)
    reasons = {entry.name.removesuffix(".weight"): entry.reason for entry in found.skipped}
    assert reasons.keys() == heads.keys() | tables.keys()
    for head, (_, said) in heads.items():
        assert said in reasons[head]
        assert reasons[head].startswith("taken for a head: ")
    every = select_layers(model, [{"params": list(model.parameters())}], SubspaceConfig(exclude=()))
    assert {layer.name for layer in every.layers} == tracked.keys() | heads.keys()


@pytest.mark.parametrize("name", ["output", "proj_out", "decoder", "to_logits", "logits", "vocab_proj", "generator",
                                  "lm_head.modules_to_save.default", "lm_head._orig_mod", "module.output",
                                  "output.modules_to_save.mine", "model._orig_mod.output"])  # fmt: skip
@pytest.mark.parametrize("outputs", [40, 512])
def test_heads_are_known_by_their_name_alone(name: str, outputs: int) -> None:
    inner = name.rpartition("_orig_mod.")[0] if "model" in name.split(".") else ""
    model = built({f"{inner}blocks.0.fc": (64, 48), name: (outputs, 64)}, {})
    config = SubspaceConfig()
    found = select_layers(model, [{"params": list(model.parameters())}], config)
    assert [layer.name for layer in found.layers] == [f"{inner}blocks.0.fc"]
    assert [entry.name for entry in found.skipped] == [f"{name}.weight"]


class LanguageModel(nn.Module):
    """A head by what it does, and one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 40)
        self.up = nn.Linear(40, 64)
        self.final = nn.Linear(64, 96)
        self.output = nn.Linear(64, 50)


def tracked(model: nn.Module, **config: Any) -> list[str]:
    return list(
        SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, SubspaceConfig(**config)).layers
    )


def test_the_user_has_the_last_word() -> None:
    model = LanguageModel()
    assert tracked(model) == ["up"]
    assert tracked(model, include=("*",)) == ["up"]
    assert tracked(model, include=("final", "up*")) == ["up", "final"]
    assert tracked(model, include=("*", "*put")) == ["up", "output"]
    assert tracked(model, include=("final*", "up")) == ["up"]  # a glob of many, not a name
    assert tracked(model, include=("final", "up"), exclude=("<heads>", "up", "fin*")) == []
    assert tracked(model, exclude=()) == ["up", "final", "output"]
    assert tracked(model, exclude=("up",)) == ["final", "output"]
    assert tracked(model, exclude=("<heads>", "up")) == []


def test_the_reason_is_in_the_summary_and_in_the_log(tmp_path: Any) -> None:
    model = LanguageModel()
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, listeners=[RunLog(tmp_path / "log")]
    )
    reasons = {entry.name: entry.reason for entry in optimizer.summary().skipped}
    assert reasons["final.weight"] == "taken for a head: out_features = 96 is the vocabulary of embed"
    assert reasons["output.weight"] == "taken for a head: it is called 'output', beside all other layers"
    optimizer.protect_("up", rank=2)  # an event, so that the log begins
    run = read_log(tmp_path / "log")
    assert ["final.weight", [96, 64], reasons["final.weight"]] in run.head["skipped"]
    assert run.config.exclude == SubspaceConfig().exclude


def test_a_tied_head_is_skipped_as_tied() -> None:
    model = LanguageModel()
    model.final = nn.Linear(40, 96, bias=False)
    model.final.weight = model.embed.weight
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, SubspaceConfig(exclude=()))
    assert {entry.name: entry.reason for entry in optimizer.summary().skipped}["embed.weight"].startswith(
        "belongs to Emb"
    )
    assert list(optimizer.layers) == ["up", "output"]


@pytest.mark.slow
def test_a_compiled_head_is_a_head() -> None:
    model = LanguageModel()
    model.output = torch.compile(nn.Linear(64, 50))  # type: ignore[assignment]
    assert tracked(model) == ["up"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b", ["a", "b"]),
        ("module._orig_mod.a.base_layer", ["a"]),
        ("a.modules_to_save.default", ["a"]),
        ("a.modules_to_save.default.b", ["a", "b"]),
        ("modules_to_save", []),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.b", ["a", "b"]),
    ],
)
def test_own_parts_of_a_name_leave_wrappers_out(name: str, parts: list[str]) -> None:
    assert own_parts(name) == parts


def test_a_layer_of_a_stack_of_one_block_is_no_head_for_its_width() -> None:
    """A byte-level GPT of one block: its MLP is as wide as the vocabulary."""
    block = nn.ModuleDict({"c_fc": nn.Linear(64, 256), "c_proj": nn.Linear(256, 64)})
    model = nn.ModuleDict({"embed": nn.Embedding(256, 64), "blocks": nn.ModuleList([block])})
    assert not find_heads(model)
    model["lm_out"] = nn.Linear(64, 256)
    assert list(find_heads(model)) == [model["lm_out"]]
