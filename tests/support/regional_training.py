"""Blocks that are compiled by themselves, trained on a mesh of data and sequence, beside the model on one process."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import models
from regional import BLOCKS, compile_blocks, sent
from running import build, gradient_error

__all__ = ["OUTER", "run_resumed", "run_trained"]

#: Name -> the convention of gradients that it asks for.
OUTER = {"ddp": "defer_mean", "fsdp": "defer_mean", "fsdp kept": "defer_mean", "fsdp sum": "defer"}


def _wrapped(model: Any, outer: str, mesh: DeviceMesh, names: list[str]) -> Any:
    if outer == "ddp":
        return DistributedDataParallel(model)
    for part in [*(part for part in model.modules() if type(part).__name__ in names), model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=outer != "fsdp kept")
        if outer == "fsdp sum":  # over the ranks of a sequence, and the mean over the data
            part.set_gradient_divide_factor(float(mesh.shape[0]))
            part.set_force_sum_reduction_for_comms(True)
    return model


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    return models.first_tensor(output).square().mean() if loss is None else loss


def _batches(name: str, arguments: dict[str, Any], data: int) -> list[dict[str, Any]]:
    """Inputs of each data rank: of other numbers."""
    found = []
    for number in range(data):
        _, inputs = build(name, arguments)
        torch.manual_seed(number)
        for key, x in inputs.items():
            if isinstance(x, Tensor) and key in ("hidden_states", "encoder_hidden_states"):
                inputs[key] = torch.randn_like(x)
            if key == "input_ids":
                inputs[key] = torch.randint_like(x, int(x.max()) + 1)
        if "input_ids" in inputs:
            inputs["labels"] = inputs["input_ids"]
        found.append(inputs)
    return found


def _names(model: Any, name: str) -> list[str]:
    return getattr(model, "_repeated_blocks", None) or BLOCKS[name]


def run_trained(rank: int, size: int, name: str, arguments: dict[str, Any], outer: str, data: int) -> dict[str, Any]:
    """Gradients after two steps on ``[data, sequence]`` ranks, and the collectives of the last forward pass."""
    mesh = init_device_mesh("cpu", (data, size // data), mesh_dim_names=("data", "sequence"))
    model, _ = build(name, arguments)
    batches = _batches(name, arguments, data)
    whole = copy.deepcopy(model)
    for inputs in batches:
        (_loss(whole(**inputs)) / data).backward()
    own = batches[mesh.get_local_rank("data")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = _wrapped(model, outer, mesh, _names(model, name))
        compile_blocks(model, _names(model, name), mesh=mesh["sequence"], grad_reduce=OUTER[outer])
        for _ in range(2):
            wrapped.zero_grad()
            with sent() as (ran, _):
                loss = _loss(wrapped(**own))
            loss.backward()
    errors = _errors([p.grad for p in model.parameters()], [p.grad for p in whole.parameters()])
    dist.barrier()
    return {"ran": dict(ran), "gradients": errors}


def _errors(found: list[Any], wanted: list[Any]) -> float:
    """The worst error of gradients, or parameters."""
    full = [x.full_tensor() if isinstance(x, DTensor) else x for x in found]
    pairs = [(a.detach(), b.detach()) for a, b in zip(full, wanted, strict=True) if a is not None and b is not None]
    usual = max(b.norm().item() for _, b in pairs)
    return max(gradient_error(a, b, usual) for a, b in pairs)


def run_resumed(rank: int, size: int, name: str, arguments: dict[str, Any], data: int, folder: str) -> dict[str, Any]:
    """Three steps of an optimizer with FSDP2, clipped; the last one again in another model, from a checkpoint."""
    mesh = init_device_mesh("cpu", (data, size // data), mesh_dim_names=("data", "sequence"))
    whole, _ = build(name, arguments)
    batches = _batches(name, arguments, data)
    own = batches[mesh.get_local_rank("data")]

    def prepared(model: Any) -> tuple[Any, torch.optim.Optimizer]:
        model = _wrapped(model, "fsdp", mesh, _names(model, name))
        compile_blocks(model, _names(model, name), mesh=mesh["sequence"], grad_reduce="defer_mean")
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(model: Any, optimizer: Any, own: list[dict[str, Any]]) -> float:
        optimizer.zero_grad()
        for inputs in own:
            (_loss(model(**inputs)) / len(own)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = prepared(copy.deepcopy(whole))
        reference = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
        norms = []
        for number in range(3):
            if number == 2:
                state = get_state_dict(model, optimizer)
                checkpoints.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)
            norms.append((step(model, optimizer, [own]), step(whole, reference, batches)))
        found["norms"] = max(abs(a - b) / b for a, b in norms)
        found["trained"] = _errors(list(model.parameters()), list(whole.parameters()))
        again, _ = build(name, arguments)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        again, optimizer = prepared(again)
        state = get_state_dict(again, optimizer)
        saved = {"model": state[0], "optimizer": state[1]}
        checkpoints.load(saved, checkpoint_id=folder)
        set_state_dict(again, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        step(again, optimizer, [own])
        found["resumed"] = _errors(list(again.parameters()), list(whole.parameters()))
    dist.barrier()
    return found
