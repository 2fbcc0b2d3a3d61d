"""Models of transformers with ``attn_implementation="eager"``: right, and keys and values are all that is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxsp
from distributed import Pool
from fxsp.passes.attention.unfused_report import GATHERED
from models import Built
from running import Case, run_case
from zoo_others_base import BATCH, IDS, TOKENS
from zoo_others_transformers import _BERT, _transformer

HEADS, WIDTH = 4, 8
_GPT2 = {"n_embd": 32, "n_head": HEADS, "n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MPT = {"d_model": 32, "n_heads": HEADS, "n_layers": 1}


def _eager(name: str, config: str, **settings: Any) -> Callable[[], Built]:
    return _transformer(name, config, mask=True, **{**settings, "attn_implementation": "eager"})


def _t5() -> Built:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": WIDTH, "d_ff": 48, "num_layers": 1, "num_heads": HEADS}
    model = T5EncoderModel(T5Config(**sizes, dropout_rate=0.0, attn_implementation="eager"))
    ids, allowed = torch.randint(3, 64, (BATCH, TOKENS)), torch.arange(TOKENS) < torch.tensor([[TOKENS], [9]])
    return model, {"input_ids": ids, "attention_mask": allowed}


#: A model, the number of ranks, heads of keys and values, and whether SDPA could do the same.
MODELS: dict[str, tuple[Callable[[], Built], int, int, bool]] = {
    "llama": (_eager("LlamaForCausalLM", "LlamaConfig"), 3, 2, True),
    "gemma2 (soft cap, window)": (_eager("Gemma2ForCausalLM", "Gemma2Config", sliding_window=4), 2, 2, False),
    "gpt2": (_eager("GPT2LMHeadModel", "GPT2Config", **_GPT2), 8, HEADS, True),
    "mpt (ALiBi)": (_eager("MptForCausalLM", "MptConfig", **_MPT), 8, HEADS, True),
    "bert": (_eager("BertModel", "BertConfig", **_BERT), 3, HEADS, True),
    "t5 (relative positions)": (_t5, 2, HEADS, True),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_model(name: str) -> None:
    build, size, kv_heads, sdpa = MODELS[name]
    model, inputs = build()
    evidence = fxsp.verify(model.eval(), world_size=size, options={"plan": IDS}, **{**inputs, "use_cache": False})
    (graph,) = evidence.graphs
    assert max(*graph.outputs, *graph.gradients) <= 1e-5, str(evidence)
    (record,) = graph.report.attentions
    assert (record.method, record.bytes) == (GATHERED, 2 * _rows(TOKENS, size, kv_heads))
    # No other value is gathered: keys and values, and what the graph returns (for GPT-2 they are among that).
    gathers = [r for r in graph.report.collectives if r.kind == "all_gather"]
    own = [r for r in gathers if "attention that is written out" in r.reason]
    assert {r.reason for r in gathers if r not in own} == {"a graph output has its global shape"}
    assert name == "gpt2" or sum(r.bytes for r in own) == record.bytes
    # The gradients of keys and values are scattered: as many bytes as they were, in two messages.
    assert f" and {record.bytes} bytes in 2 backward" in record.detail or name.startswith("t5")
    assert record.rejected[0][1].startswith("would be " if sdpa else "it has no tanh")


def _rows(tokens: int, size: int, heads: int, batch: int = BATCH) -> int:
    """Bytes of a rank's keys, sent to all others."""
    return batch * heads * -(-tokens // size) * WIDTH * 4 * (size - 1)


def test_llama_on_processes(ranks: Callable[[int], Pool]) -> None:
    case = Case("llama", {"attention": "eager", "mask": True, "batch": 2}, {"plan": IDS})
    for outcome in ranks(2).run(run_case, case):
        assert max(outcome.errors) <= 1e-5
        assert outcome.attentions == [GATHERED, GATHERED]
        assert outcome.ran == outcome.planned == {"all_gather": 5}  # keys and values of two layers, and the output
        assert len(outcome.implicit) == 4
        assert len(outcome.warnings) == 1
        assert "attention that is written out at modeling_llama.py" in outcome.warnings[0]
