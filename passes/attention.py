"""Attention: how scaled dot product attention runs on split tokens.

The decision is made where types are known (*propagate*), the nodes are written by *attention* once the graph is local.

========== ==================================== ======================================================================
method     when                                 what moves
========== ==================================== ======================================================================
local      queries split, keys/values whole     nothing
ulysses    both split, heads divide             one all-to-all of q, k, v; one of the output (DeepSpeed-Ulysses)
hybrid     heads divide over some ranks only    the same among those, keys and values around a ring of the others
ring       it is asked for                      keys and values, block by block
gather_kv  both split, heads do not divide      one all-gather of keys and values
========== ==================================== ======================================================================

Where several are legal their costs decide (:mod:`fxsp.passes.attention_cost`); heads are never padded.

Without a ring an attention sees keys and values in their original order, whole and without pads, so masks and the
causal flag keep their global meaning; a mask is cut by query rows or by heads, never reordered.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxsp.errors import UnsupportedError
from fxsp.passes.attention_cost import Candidate, Link, exchange_bytes, factorizations
from fxsp.passes.decide import Decision
from fxsp.passes.grouped import repeated_heads
from fxsp.passes.rules import Call, Dims, OpRule, overloads, rule
from fxsp.passes.rules_elementwise import broadcast
from fxsp.source import module_path, node_source
from fxsp.types import Length, Sequence, Shard, Type, Used, as_length, product, same_length

__all__ = [
    "SDPA",
    "AttentionChoice",
    "decide_attention",
    "distributed_attention",
    "ring_refusal",
]

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionChoice:
    """The method of one attention; ``Decision.detail`` of its call.

    ``method`` is ``"local"``, ``"gather_kv"``, ``"ulysses"``, ``"ring"`` or ``"hybrid"``.
    """

    method: str
    #: The tokens of the queries, and of the keys and values (None: whole on every rank).
    queries: Sequence
    keys: Sequence | None
    #: Bytes that each rank sends, forward.
    sent: Length
    rejected: tuple[tuple[str, str], ...] = ()
    #: Ranks that exchange heads, and ranks in a ring.  ulysses is (P, 1), ring (1, P), hybrid has both above 1: ranks
    #: ``i*u .. (i+1)*u`` exchange heads, and pass keys and values on to the ranks ``u`` further.
    ulysses: int = 1
    ring: int = 1
    #: How often each key/value head is repeated for the query heads, and how often before the exchange already.
    repeat: int = 1
    spread: int = 1


def distributed_attention(*args: object, **kwargs: object) -> object:
    """Marks an attention between *partition* and *attention*: arguments of SDPA, local; it is never called."""
    raise AssertionError("distributed_attention is lowered by the attention pass")


@rule([SDPA])
def sdpa(call: Call) -> OpRule | None:
    """Batch and query rows pass: ``([b, h, m, d], [b, h, n, d], [b, h, n, e]) -> ([b, h, m, e]) whole={d, e, n}``."""
    q, k, v = call.shape("query"), call.shape("key"), call.shape("value")
    (out,) = call.result_shapes()
    lead = out[:-2]
    (bq, bk, bv), batch, sizes = broadcast([q[:-2], k[:-2], v[:-2]], lead, "b")
    whole = {"d", "n", "e"}
    if call.get("enable_gqa") and lead:
        # Query heads share key heads: the head dimension cannot be cut factor by factor.
        bk, bv = (*bk[:-1], ("hk",)), (*bv[:-1], ("hk",))
        whole |= {"hk", f"b{len(lead) - 1}"}
        sizes["hk"] = k[-3]
    if call.get("is_causal"):
        whole.add("m")
    sizes |= {"m": q[-2], "n": k[-2], "d": q[-1], "e": v[-1]}
    operands: list[Dims] = [(*bq, ("m",), ("d",)), (*bk, ("n",), ("d",)), (*bv, ("n",), ("e",))]
    if isinstance(call.get("attn_mask"), Node):
        mask = call.shape("attn_mask")
        (dims,), _, _ = broadcast([mask], (*lead, q[-2], k[-2]), "m")
        names = {f"m{i}": f for i, f in enumerate([*(b[0] for b in batch), "m", "n"])}
        operands.append(tuple(tuple(names[f] for f in d) for d in dims))
    return OpRule(tuple(operands), ((*batch, ("m",), ("e",)),), sizes, whole=frozenset(whole))


def decide_attention(
    call: Call,
    types: list[Type],
    size: int,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    latency: float | None = None,
    bandwidth: float | None = None,
    outputs: Collection[Node] = (),
) -> Decision | None:
    """A decision where queries are split by tokens; None where the factor rule decides (split batch, whole queries).

    ``ring_degree`` above 1 asks for a ring of so many ranks, each of them ``ulysses_degree`` ranks that exchange heads.
    ``latency`` (seconds) and ``bandwidth`` (bytes per second) weigh messages against bytes, see ``attention_cost``.
    Keys and values among ``outputs`` (the cache of a language model) become whole anyway: nothing else is sent then.
    """
    if call.op is not SDPA or not any(isinstance(t, Shard) for t in types[:3]):
        return None
    q, k, v = call.shape("query"), call.shape("key"), call.shape("value")
    tokens = len(q) - 2
    q_type, *kv_types = types[:3]
    if not (isinstance(q_type, Shard) and q_type.dim == tokens and q_type.plain):
        return None
    if any(isinstance(t, Shard) and not (t.dim == tokens and t.plain) for t in kv_types):
        return None
    if not len(q) == len(k) == len(v) or not all(same_length(a, b) for a, b in zip(k[:-1], v[:-1], strict=True)):
        return None  # broadcast in ways that no exchange knows
    _refuse_dropout(call)
    itemsize = call["query"].meta["val"].element_size()
    keys = next((t.sequence for t in kv_types if isinstance(t, Shard)), None)
    mask = call.get("attn_mask")
    mask_shape = call.shape("attn_mask") if isinstance(mask, Node) else ()
    result = Shard(tokens, q_type.sequence, origin=f"{call.op} by query tokens")

    def decision(choice: AttentionChoice, mask_type: Type) -> Decision:
        kv: Type = Used() if keys is None else Shard(tokens, keys)
        operands = (q_type, kv, kv, mask_type) if isinstance(mask, Node) else (q_type, kv, kv)
        return Decision(operands, (result,), _reason(types, operands), detail=choice)

    rows = _mask_rows(mask_shape, q, q_type.sequence)
    if ulysses_degree is None and ring_degree is None and all(call[name] in outputs for name in ("key", "value")):
        keys = None
    if keys is None:
        return decision(AttentionChoice("local", q_type.sequence, None, 0), rows)

    repeat = _repeats(call, kv_types)
    if repeat > 1:
        k, v = ((s[0], as_length(s[1] // repeat), *s[2:]) for s in (k, v))
    # Rows of whole segments travel in one place only: the output of an exchange brings them the other ranks' heads.
    kv_bytes = product((*k[:-2], keys.split_length(size), k[-1] + v[-1], itemsize))
    gather_bytes = (size - 1) * kv_bytes
    q_width = q_type.sequence.split_length(size) * q[-1] + q_type.sequence.local_length(size) * v[-1]
    q_bytes = product((*q[:-2], as_length(q_width), itemsize))
    link = Link.of(call["query"].meta["val"].device.type, latency, bandwidth)

    def candidate(method: str, u: int, r: int) -> Candidate:
        spread = _spread(k, repeat, u)
        sent = exchange_bytes(q_bytes, as_length(kv_bytes * spread), u, r)
        spread_k = (k[0], as_length(k[1] * spread), *k[2:]) if len(k) == 4 else k
        refusal = (ring_refusal(q, k, repeat) if r > 1 else "") or _ulysses_refusal(q, spread_k, u)
        return Candidate(method, u, r, sent, spread, refusal)

    whole, *rings = (candidate(*way) for way in factorizations(size))
    gather = Candidate("gather_kv", 1, 1, gather_bytes)
    asked = next((c for c in rings if c.ring == ring_degree and not c.refusal), None)
    usual = q_type.sequence.same_as(keys) and whole.spread == 1
    if asked is not None:
        best = asked
    elif not whole.refusal and (usual or ulysses_degree not in (None, 1)):
        # Never more than two messages, and each rank holds keys and values of its own heads only.
        best = whole
    else:
        legal = [c for c in (gather, *rings) if not c.refusal] if whole.refusal else [whole, gather]
        best = min(legal, key=lambda c: (c.seconds(link), c.messages))
    rejected = tuple((c.name, c.text(link)) for c in (whole, gather, *rings) if c is not best)
    choice = AttentionChoice(
        best.method, q_type.sequence, keys, best.sent, rejected, best.ulysses, best.ring, repeat, best.spread
    )
    if best.ulysses == 1:
        return decision(choice, rows)
    per_head = len(mask_shape) >= 3 and not same_length(mask_shape[-3], 1)
    if per_head and best.ring == 1:
        origin = "the mask of a rank's own heads"
        return decision(choice, Shard(len(mask_shape) - 3, Sequence.of(mask_shape[-3]), origin=origin))
    return decision(choice, Used())


def _repeats(call: Call, kv_types: list[Type]) -> int:
    """How often keys and values repeat the heads of tensors that are split as they are; 1 if they do not."""
    found = set()
    for name, type_ in zip(("key", "value"), kv_types, strict=True):
        x, times = repeated_heads(call[name])
        if times > 1 and not x.meta["sp"].same_as(type_):
            return 1
        found.add(times)
    return found.pop() if len(found) == 1 else 1


def _spread(k: tuple[Length, ...], repeat: int, size: int) -> int:
    """How often to repeat key/value heads before the exchange, so that they divide over the ranks; 1 if it is moot."""
    fits = (n for n in range(1, repeat + 1) if repeat % n == 0 and same_length(as_length(k[1] * n % size), 0))
    return next(fits, 1) if repeat > 1 else 1


def ring_refusal(q: tuple[Length, ...], k: tuple[Length, ...], repeat: int) -> str:
    """Why keys and values cannot go around a ring, or nothing; ``k`` has the heads that travel."""
    if len(q) != 4 or len(k) != 4:
        return f"queries of {len(q)} dimensions have no head dimension"
    if not isinstance(q[1], int) or not isinstance(k[1], int) or q[1] % (k[1] * repeat):
        return f"{k[1]} key/value heads do not divide {q[1]} query heads"
    if not same_length(q[0], k[0]):
        return "queries and keys differ in batch size"
    return ""


def _ulysses_refusal(q: tuple[Length, ...], k: tuple[Length, ...], size: int) -> str:
    """Why heads cannot be exchanged, or nothing."""
    if len(q) != 4 or len(k) != 4:
        return f"queries of {len(q)} dimensions have no head dimension"
    for name, heads in (("query", q[1]), ("key/value", k[1])):
        if not isinstance(heads, int) or heads % size:
            return f"{heads} {name} heads do not divide over {size} ranks"
    if not same_length(q[0], k[0]):
        return "queries and keys differ in batch size"
    return ""


def _mask_rows(mask: tuple[Length, ...], q: tuple[Length, ...], sequence: Sequence) -> Type:
    """A mask beside local queries: its rows are split like theirs, unless one row serves all queries."""
    if len(mask) < 2 or (same_length(mask[-2], 1) and not same_length(q[-2], 1)):
        return Used()
    return Shard(len(mask) - 2, sequence, origin="the mask of a rank's own query rows")


def _reason(types: list[Type], needed: tuple[Type, ...]) -> str:
    """Why an operand that is split is needed otherwise."""
    for name, have, want in zip(("query", "key", "value", "mask"), types, needed, strict=False):
        if isinstance(have, Shard) and not have.same_as(want):
            return f"the {name} of the attention is {have}, and is needed as {want}"
    return ""


def _refuse_dropout(call: Call) -> None:
    if call.get("dropout_p"):
        raise UnsupportedError(
            f"{call.op} in {module_path(call.node) or 'the root module'} ({node_source(call.node)}): attention dropout "
            f"(dropout_p={call['dropout_p']}) on split tokens cannot draw the same mask as one device. "
            "Set the dropout of attention to 0, or call model.eval()."
        )


assert overloads("scaled_dot_product_attention") == [SDPA]
