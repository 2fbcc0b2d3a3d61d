"""Machines by name and by file: links within a node and between nodes, and what is decided by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsp
import small
from fxsp.config import Options
from fxsp.device import Device, Link
from fxsp.known_devices import DEVICES, LINKS, NETWORK
from fxsp.machine import KINDS, Machine, Travel, read_machine


def _attention(heads: int, machine: Any, size: int, tokens: int = 64, **options: Any) -> Any:
    """The record of one attention of a small model on so many ranks."""
    q = torch.randn(1, heads, tokens, 8)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x.sin(), x.cos(), x.tanh())

    plan = {"": {"x": fxsp.SequenceParallelInput(split_dim=2)}}
    with torch.no_grad():
        found = fxsp.explain(_Module(attend), q, world_size=size, plan=plan, options={"machine": machine, **options})
    return found.attentions[0]


class _Module(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _machine(inside: Link, between: Link | None = None, per_node: int | None = None, **kinds: Link) -> Machine:
    device = Device("invented", 1e12, 1e12, 0.0, inside)
    return Machine("invented", device, between or inside, per_node, inside=tuple(kinds.items()))


def test_known_devices_have_a_source_and_a_link() -> None:
    assert {"a100", "h100", "h200", "b200", "l20", "mi300x"} <= set(DEVICES)
    assert all(row[-1] for row in (*DEVICES.values(), *LINKS.values()))
    assert NETWORK in LINKS
    for name in DEVICES:
        assert read_machine(f"{name}x8").device.flops == DEVICES[name][1]


def test_names_of_machines() -> None:
    one, two = read_machine("h100x8"), read_machine("2xmi300xx8")
    assert (one.nodes, one.per_node, two.nodes, two.per_node) == (None, 8, 2, 8)
    assert two.device.name == "MI300X, Infinity Fabric"
    assert read_machine("l20").per_node is None
    assert one.link("all_gather", 8) == one.link("all_gather", 4) == Link(10e-6, 450e9)
    assert one.link("all_gather", 16) == one.link("neighbour", 3) == Link(20e-6, 50e9)
    # Of 15 others 8 are on the other node; the way to them is the slower one.
    assert one.link("all_to_all", 16) == Link(20e-6, pytest.approx(50e9 * 15 / 8))
    assert one.of(6).link("neighbour", 3) == Link(10e-6, 450e9), "six ranks are on one node, whatever it holds more"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("h101x8", "Known devices: a100"),
        ("h100x0", "2xh100x8"),
        ("2xh100", "2xh100x8"),
        (8, "'machine' is 8"),
        ({}, "name like 'h100x8'"),
    ],
)
def test_no_such_machine(given: Any, part: str) -> None:
    with pytest.raises(fxsp.OptionError, match=part):
        Options.parse({"machine": given})


def test_a_machine_with_fewer_devices_than_ranks() -> None:
    with pytest.raises(fxsp.OptionError, match="2xh100x4 is 2 nodes of 4, but there are 16 ranks"):
        _attention(16, "2xh100x4", 16)
    assert _attention(8, "2xh100x4", 8).method


def test_a_file_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "ours.json"
    machine = _machine(Link(1e-5, 1e9), Link(1e-4, 1e8), 4, all_to_all=Link(2e-5, 2e9))
    path.write_text(machine.to_json())
    assert read_machine(path) == read_machine(str(path))
    again = read_machine(path)
    for kind in KINDS:
        for span in (2, 4, 8):
            assert again.link(kind, span).latency == machine.link(kind, span).latency
    assert Options.parse({"machine": path}).machine == again


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"inside": {}}, "no links"),
        ({"inside": {"broadcast": "nvlink4"}}, "no such collectives: broadcast"),
        ({"inside": {"any": {"latency": -1, "bandwidth": 1e9}}}, "latency is -1"),
        ({"inside": {"any": {"latency": 0, "bandwidth": 0}}}, "bandwidth is 0"),
        ({"per_node": 0}, "per_node is 0"),
        ({"per_node": 8, "between": None}, "TypeError"),
        ({"device": {"name": "x"}}, "KeyError: 'flops'"),
    ],
)
def test_a_file_that_does_not_describe_a_machine(tmp_path: Path, changed: dict[str, Any], part: str) -> None:
    path = tmp_path / "wrong.json"
    right = json.loads(_machine(Link(1e-5, 1e9)).to_json())
    path.write_text(json.dumps(right | changed))
    with pytest.raises(fxsp.OptionError, match=part):
        read_machine(path)
    path.write_text("{")
    with pytest.raises(fxsp.OptionError, match="does not describe a machine"):
        read_machine(path)


def test_seconds_are_those_of_the_links_taken() -> None:
    machine = _machine(Link(1.0, 10.0), Link(100.0, 1.0), 2, all_to_all=Link(2.0, 5.0))
    assert machine.seconds([Travel("all_to_all", 2, 2, 10), Travel("neighbour", 4, 1, 7)]) == 2 * 2 + 2 + 100 + 7


# --- what is decided --------------------------------------------------------------------------------------------------


def test_a_slow_link_prefers_bytes_and_a_late_one_messages() -> None:
    # 8 heads on 4 ranks: an exchange sends half of what gathered keys and values are, in twice the messages.
    assert _attention(8, _machine(Link(0.0, 1e3)), 4).method == "ulysses"
    assert _attention(8, _machine(Link(1.0, 1e12)), 4).method == "gather_kv"


def test_the_slow_collective_is_not_taken() -> None:
    link = Link(1e-6, 1e9)
    assert _attention(8, _machine(link), 4).method == "ulysses"
    assert _attention(8, _machine(link, all_to_all=Link(1e-6, 1e6)), 4).method == "gather_kv"
    gathers = {"all_to_all": Link(1e-6, 1e6), "all_gather": Link(1e-6, 1e6)}
    assert _attention(8, _machine(link, **gathers), 4).method == "ring"


def test_heads_are_exchanged_within_a_node_where_nodes_are_far_apart() -> None:
    near, far = Link(0.0, 1e12), Link(0.0, 1e9)
    # On one node 8 heads go to 8 ranks; on two the exchange stays inside where the far link carries less so.
    assert _attention(8, _machine(near), 8).method == "ulysses"
    exchange = Link(0.0, 1e6)  # measured: an exchange among all is slow
    machine = Machine("two", Device("x", 1e12, 1e12, 0.0, near), far, 4, outside=(("all_to_all", exchange),))
    record = _attention(8, machine, 8)
    assert record.method == "hybrid"
    assert {"ulysses", "ring", "gather_kv", "hybrid 2 x 4"} <= {name for name, _ in record.rejected}, "it is 4 x 2"


def test_options_for_the_link_go_before_the_machine() -> None:
    assert _attention(8, "2xh100x4", 8, latency=1.0, bandwidth=1e15).method == "gather_kv"


def test_the_page_is_drawn_for_the_machine() -> None:
    with torch.no_grad():
        found = fxsp.explain(
            small.Model(), small.inputs(), world_size=2, plan=small.SPLIT, options={"machine": "l20x4"}
        )
    assert '"device":"l20x4: L20, PCIe"' in fxsp.offline.render.page.page(found)
