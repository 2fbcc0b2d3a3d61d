"""Whole models with hooks: eager, and compiled with their hooks on, beside one process."""

from __future__ import annotations

from typing import Any

import pytest

from hooking import HookCase, Hooked, run_hooked, simulate_compiled

BOUND = 1e-5
ASIDE = "hooks of sequence parallelism stand aside: the plan is compiled"

#: The models of the compiler's own tests.
MODELS = ["flux", "flux2", "wan", "wan_i2v", "qwen_image", "qwen_image_mask", "llama", "bert"]


def check(ranks, size: int, case: HookCase) -> list[Hooked]:
    bound = 1e-12 if case.double else BOUND
    ran = ranks(size).run(run_hooked, case)
    for rank, seen in enumerate(ran):
        for mode, error in seen.errors.items():
            assert error <= bound, f"rank {rank}, {mode}: {error}"
        for mode, (error, name) in seen.gradient_errors.items():
            assert error <= bound, f"rank {rank}, {mode}: {error} of {name}"
        assert seen.mismatched == []
        assert set(seen.errors) == set(case.modes)
        assert seen.implicit == [], "the models need no gather but that of the plan"
        if case.modes[-1] != "eager" and not case.checkpoint:  # a warning of transformers is a graph break
            assert ASIDE in seen.compiled_notes
            assert len(seen.compiled_attentions) == len(seen.attentions)
    return ran


def case_of(name: str, **options) -> HookCase:
    mask = {"mask": True} if name == "qwen_image_mask" else {}
    arguments = {**mask, **options.pop("arguments", {})}
    return HookCase(name.removesuffix("_mask"), arguments, **options)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_eager_and_compiled_and_one_process_agree(ranks, name: str, size: int) -> None:
    """The compiled model is simulated, but for one on two processes."""
    layers = {"layers": 1} if name in ("llama", "bert") else {}
    real = (name, size) == ("llama", 2)
    case = case_of(name, arguments={"batch": 2, **layers}, modes=("eager", "sp") if real else ("eager",))
    (eager, *_) = check(ranks, size, case)
    if not real:
        check_compiled(size, case, eager)


def check_compiled(size: int, case: HookCase, eager: Hooked) -> None:
    """The same model compiled with its hooks on, for all ranks in this process."""
    seen = simulate_compiled(size, case)
    assert seen.errors["sp"] <= BOUND
    assert not case.gradients or seen.gradient_errors["sp"][0] <= BOUND, seen.gradient_errors
    assert seen.mismatched == []
    assert seen.implicit == []
    if not case.checkpoint:  # a warning of transformers is a graph break
        assert ASIDE in seen.compiled_notes
        assert len(seen.compiled_attentions) == len(eager.attentions)


#: Lengths that do not divide, a second one, and fewer tokens than ranks.
LENGTHS = {
    "flux": [{"image": 11, "text": 5}, {"image": 2, "text": 1}, {"image": 23, "text": 2}],
    "flux2": [{"image": 13, "text": 3}, {"image": 1, "text": 2}],
    "wan": [{"frames": 1, "height": 2, "width": 2}, {"frames": 3, "height": 2, "width": 6}],
    "qwen_image_mask": [{"height": 1, "width": 2, "text": 3}, {"height": 5, "width": 3, "text": 5}],
    "llama": [{"tokens": 17}, {"tokens": 1}, {"tokens": 2}],
    "bert": [{"tokens": 5}, {"tokens": 2}, {"tokens": 19}],
    "ltx": [{"frames": 1, "size": 1}, {"frames": 3, "size": 3}],
    "cogvideox": [{"frames": 1, "size": 2, "text": 3}, {"frames": 3, "size": 6, "text": 5}],
    "hunyuan_video": [{"frames": 1, "size": 2, "text": 4}, {"frames": 3, "size": 6, "text": 2}],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_change_from_call_to_call(ranks, name: str) -> None:
    first, *rest = LENGTHS[name]
    check(ranks, 3, case_of(name, arguments=first, calls=tuple(rest), modes=("eager",)))


@pytest.mark.parametrize("name", ["sd3", "pixart", "gemma", "gpt2"])
def test_further_models(ranks, name: str) -> None:
    check(ranks, 3, HookCase(name, modes=("eager",), gradients=True))


@pytest.mark.parametrize(("name", "why"), [("mixtral", "sort"), ("vit", "takes one of all tokens")])
def test_what_mixes_tokens_is_gathered_and_reported(ranks, name: str, why: str) -> None:
    for seen in ranks(3).run(run_hooked, HookCase(name, modes=("eager",), gradients=True)):
        assert seen.errors["eager"] <= BOUND
        assert seen.gradient_errors["eager"][0] <= BOUND, seen.gradient_errors
        assert any(why in gather for gather in seen.implicit), seen.implicit
        assert any("ImplicitGatherWarning: hooks: gathered for" in text for text in seen.warnings)


#: Every model with or without checkpoints (hooks have both for small models, in ``test_hooks_plans.py``).
GRADIENTS = [("flux", "plain"), ("wan", ""), ("qwen_image_mask", ""), ("llama", "plain"), ("bert", "")]


@pytest.mark.parametrize(("name", "checkpoint"), GRADIENTS)
def test_gradients(ranks, name: str, checkpoint: str) -> None:
    """Compiled, one is on processes."""
    real = name == "bert"
    case = case_of(name, gradients=True, checkpoint=checkpoint, modes=("eager", "sp") if real else ("eager",))
    (eager, *_) = check(ranks, 2, case)
    if not real:
        check_compiled(2, case, eager)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_with_reentrant_checkpoints(ranks, name: str) -> None:
    case = case_of(name, gradients=True, checkpoint="reentrant", modes=("eager",))
    check(ranks, 3, case)


#: Positions and masks that are made from a length; a graph per length, and one for all.
PLAIN = [
    ("llama", "plain", (1, 2), ({"tokens": 9},)),
    ("bert", "plain", None, ({"tokens": 5},)),
    ("llama", "plain dynamic", None, ({"tokens": 2}, {"tokens": 9})),
    ("bert", "plain dynamic", (2, 1), ({"tokens": 5}, {"tokens": 8})),
]


@pytest.mark.parametrize(("name", "mode", "degrees", "calls"), PLAIN)
def test_plain_compile_of_a_hooked_model_is_one_graph(ranks, name: str, mode: str, degrees: Any, calls: Any) -> None:
    layers = {"layers": 1}
    case = case_of(name, arguments=layers, calls=calls, degrees=degrees, modes=(mode,), gradients=True)
    check(ranks, 2, case)


#: Methods that a configuration asks for; where heads do not divide, another one.
DEGREES = [
    (2, (1, 2), "ring"),
    (3, (1, 3), "ring"),
    (4, (1, 4), "ring"),
    (4, (2, 2), "hybrid"),
]


@pytest.mark.parametrize(("size", "degrees", "method"), DEGREES)
@pytest.mark.parametrize("name", ["qwen_image_mask", "llama"])
def test_rings(ranks, name: str, size: int, degrees: tuple[int, int], method: str) -> None:
    case = case_of(name, degrees=degrees, modes=("eager",), gradients=True, double=True)
    assert set(check(ranks, size, case)[0].attentions) == {method}


def test_a_ring_under_checkpoints_and_with_few_tokens(ranks) -> None:
    for checkpoint in ("plain", "reentrant"):
        check(ranks, 4, case_of("llama", degrees=(2, 2), modes=("eager",), gradients=True, checkpoint=checkpoint))
    few = ({"tokens": 2}, {"tokens": 5}, {"tokens": 3})
    check(ranks, 4, case_of("llama", arguments={"tokens": 1}, calls=few, degrees=(2, 2), modes=("eager",)))
