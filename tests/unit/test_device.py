"""A device and its link: what a message costs where ways to attend are chosen, and where time is drawn."""

from __future__ import annotations

import pytest
import torch

import fxsp
import small
from fxsp.cost.timeline import timeline
from fxsp.device import CPU, H100, Link, device_of


def test_a_link_by_device_type_and_by_options() -> None:
    assert Link.of("cpu") == Link(0.0, 2e9)
    assert Link.of("cuda") == Link(0.0, 450e9)
    assert Link.of("cuda", 1e-6, 5e9).seconds(3, 10**9) == pytest.approx(3e-6 + 0.2)


def test_a_device_by_its_type() -> None:
    assert device_of("cpu") is CPU
    assert device_of("cuda") is device_of("meta") is H100


def test_a_device_takes_the_link_that_is_given() -> None:
    assert H100.linked(None, None) is H100
    slow = H100.linked(None, 1e9)
    assert slow.link == Link(H100.link.latency, 1e9)
    assert (slow.flops, slow.name) == (H100.flops, "H100 SXM, 10 us and 1 GB/s to others")
    assert H100.seconds(10**12, 0) == pytest.approx(H100.launch + 1e12 / H100.flops)


def test_time_is_drawn_with_the_link_that_the_choice_is_made_with() -> None:
    with torch.no_grad():
        e = fxsp.explain(small.Model(), small.inputs(), world_size=2, plan=small.SPLIT, options={"bandwidth": 1e3})
    program, measured = e.results[0].program, e.measures[0]
    assert program is not None
    assert measured is not None
    sent = {s.record.value: s.bytes for s in measured.forward}
    device = H100.linked(program.options.latency, program.options.bandwidth)
    for span in timeline(program.gm, sent, measured.number, device):
        if span.communicates:
            assert span.end - span.start == pytest.approx(10e-6 + sent[span.node.name] / 1e3)
    assert '"device":"H100 SXM, 10 us and 1e-06 GB/s to others"' in fxsp.offline.render.page.page(e)
