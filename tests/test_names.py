"""Names in tables: at 80 columns they still tell layers apart."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file

from svd_optim.console.names import shorten_names
from svd_optim.console.spectra import inspect_file, inspection_table

GPT = [
    f"blocks.{i}.{part}"
    for i in (0, 5, 11)
    for part in ("attn.c_q", "attn.c_k", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
LLAMA = [f"model.layers.{i}.{part}" for i in (0, 9, 31)
         for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
BERT_PARTS = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
BERT = [f"bert.encoder.layer.{i}.{part}" for i in (0, 11) for part in BERT_PARTS]
WRAPPED = [f"base_model.model.{name}.base_layer" for name in LLAMA]
MODELS = {"GPT": GPT, "Llama": LLAMA, "BERT": BERT, "PEFT": WRAPPED}
ALL = MODELS | {f"{model}, weights": [f"{name}.weight" for name in names] for model, names in MODELS.items()}


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("width", [22, 24, 30, 40])
def test_numbers_and_last_parts_stay_whole(model: str, width: int) -> None:
    names = ALL[model]
    short = shorten_names(names, width)
    assert len(set(short)) == len(names) and max(map(cell_len, short)) <= width
    for name, shown in zip(names, short, strict=True):
        parts = name.removesuffix(".weight").removesuffix(".base_layer").split(".")
        assert "…" not in shown
        assert parts[-1] in shown.split(".")
        assert [p for p in shown.split(".") if p.isdigit()] == [p for p in parts if p.isdigit()]


def test_weight_and_the_beginnings_of_parts_are_given_up_first() -> None:
    names = [f"{name}.weight" for name in GPT]
    assert shorten_names(names, 28) == names
    assert shorten_names(names, 27) == shorten_names(names, 21) == GPT
    assert shorten_names(names, 20) == [name.replace("blocks", "b") for name in GPT]
    assert shorten_names(names, 13)[:4] == ["b.0.a.c_q", "b.0.a.c_k", "b.0.a.c_proj", "b.0.m.c_fc"]
    assert shorten_names(names, 12)[-1] == "b.11.m…_proj"


def test_beginnings_of_parts_tell_them_apart() -> None:
    names = ["encoder.attention.query", "encoder.attention_norm.query", "embedder.attention.key", "encoder.9.query"]
    assert shorten_names(names, 10) == ["e.a.query", "e.at.query", "em.a.key", "e.9.query"]
    assert shorten_names(["a.first", "abc.first", "b.second"], 8) == ["a.first", "ab.first", "b.second"]


def test_weight_stays_where_it_tells_names_apart() -> None:
    names = ["blocks.0.attention.weight", "blocks.0.attention", "blocks.0.attention.bias"]
    assert shorten_names(names, 20) == ["b.0.attention.weight", "b.0.attention", "b.0.attention.bias"]


def test_one_name_that_is_too_long_does_not_shorten_the_others() -> None:
    long = "head." + "z" * 60
    short = shorten_names([*GPT, long], 21)
    assert short[:-1] == GPT and cell_len(short[-1]) == 21 and "…" in short[-1]


def test_a_single_name_and_names_without_parts_are_cut() -> None:
    assert shorten_names(["model.layers.0.self_attention.query_projection"], 30) == ["m.l.0.s.query_projection"]
    assert shorten_names(["x" * 40], 9) == ["xxxx…xxxx"]
    assert shorten_names(["x" * 40 + "a", "x" * 40 + "b"], 9) == ["xxxx…xxxa", "xxxx…xxxb"]
    assert shorten_names([], 9) == []
    assert shorten_names(["weight"], 9) == ["weight"]
    assert shorten_names([".", "..", "a.", ".a"], 9) == [".", "..", "a.", ".a"]


def test_any_names_fit_and_stay_apart_where_there_is_room() -> None:
    rng = random.Random(0)
    words = ["model", "layers", "attn", "attention", "a", "b", "q_proj", "weight", "0", "1", "10", "层", "", "mlp" * 5]
    for _ in range(2000):
        names = list({".".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 8))})
        width = rng.randint(1, 40)
        short = shorten_names(names, width)
        assert len(short) == len(names) and max(map(cell_len, short)) <= width
        if width >= 30:
            assert len(set(short)) == len(names), (names, width, short)


def test_the_matrices_of_a_model_stay_apart_at_72_columns(tmp_path: Path) -> None:
    names = [f"blocks.{i}.{part}.weight" for i in (0, 11) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    save_file({name: torch.randn(30, 20) for name in [*names, "embed.weight"]}, tmp_path / "model.safetensors")
    console = Console(width=72, color_system=None)
    with console.capture() as capture:
        console.print(inspection_table(inspect_file(tmp_path), 72))
    shown = re.findall(r"^(\S+) +f32", capture.get(), re.MULTILINE)
    assert shown == [*(name.removesuffix(".weight") for name in names), "embed"]
