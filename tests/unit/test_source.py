"""Source lines and module paths of graph nodes, as Dynamo writes them."""

from __future__ import annotations

import pytest
import torch

from fxsp.source import clean_module_path, module_path, node_source


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn.to_q", "blocks.0.attn.to_q"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self'].blocks[0].attn", "blocks.0.attn"),
        ("L['fn'].0._orig_mod.l.0", "0.l.0"),
        ("L['args'][0].model.layers.0", "model.layers.0"),  # the first of a decorator's `*args`
        ("G['model']._orig_mod.blocks.1", "blocks.1"),
        ("L['fn'].__closure__[0].cell_contents.blocks.0", "blocks.0"),
        ("getattr(L['self'].blocks, '0')", "blocks.0"),
        ("getattr(getattr(L['self'], 'blocks'), '0')", "blocks.0"),
        ("L['self'].a._checkpoint_wrapped_module.b", "a.b"),
    ],
)
def test_clean_module_path(source: str, path: str) -> None:
    assert clean_module_path(source) == path


def _node(**meta: object) -> torch.fx.Node:
    node = torch.fx.Graph().placeholder("x")
    node.meta.update(meta)
    return node


def test_innermost_module_wins() -> None:
    stack = {"1": ("L['self'].blocks.0", torch.nn.Module), "2": ("L['self'].blocks.0.norm", torch.nn.LayerNorm)}
    assert module_path(_node(nn_module_stack=stack)) == "blocks.0.norm"
    assert module_path(_node()) == ""


def test_source_is_the_innermost_line_outside_torch() -> None:
    trace = (
        '  File "/home/me/train.py", line 7, in step\n    loss = model(x)\n'
        '  File "/home/me/model.py", line 42, in forward\n    return self.proj(x)\n'
        f'  File "{torch.nn.modules.linear.__file__}", line 125, in forward\n    return F.linear(input)\n'
    )
    assert node_source(_node(stack_trace=trace)) == "model.py:42"
    assert node_source(_node(stack_trace=trace), full=True) == "/home/me/model.py:42"
    assert node_source(_node()) == ""


def test_dynamo_writes_what_is_read() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x).relu()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), torch.nn.Sequential(Block())])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    seen: list[tuple[str, str]] = []

    def look(gm: torch.fx.GraphModule, inputs: object) -> object:
        calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
        seen.extend((module_path(n), node_source(n)) for n in calls)
        return gm.forward

    torch.compile(Model(), backend=look)(torch.randn(2, 4))
    assert [path for path, _ in seen] == ["blocks.0.proj", "blocks.0", "blocks.1.0.proj", "blocks.1.0"]
    assert all(source.startswith("test_source.py:") for _, source in seen)
