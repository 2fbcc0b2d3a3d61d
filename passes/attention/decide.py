"""Attention: how scaled dot product attention runs on split tokens.

The decision is made where types are known (*propagate*), the nodes are written by *attention* once the graph is local.

========== ==================================== ======================================================================
method     when                                 what moves
========== ==================================== ======================================================================
local      queries split, keys/values whole     nothing
ulysses    both split, heads divide             one all-to-all of q, k, v; one of the output (DeepSpeed-Ulysses)
hybrid     heads divide over some ranks only    the same among those, keys and values around a ring of the others
ring       it is asked for                      keys and values, block by block
gather_kv  both split, or keys alone            one all-gather of keys and values
merged     queries whole, keys split            one all-gather of the outputs, and of their log-sum-exps
========== ==================================== ======================================================================

Where several are legal their costs decide (:mod:`fxsp.passes.attention.choose`); heads are never padded.

Without a ring an attention sees keys and values in their original order, whole and without pads, so masks and the
causal flag keep their global meaning; a mask is cut by query rows or by heads, never reordered.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxsp.errors import UnsupportedError
from fxsp.kernels.counts import split_bytes
from fxsp.passes.attention.choose import Question, choose
from fxsp.passes.attention.methods.split_kv import choose_for_whole_queries
from fxsp.passes.attention.operators import BANDED, SDPA, AttentionOp, attention_op
from fxsp.passes.attention.repeat_kv import repeated_heads
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, type_of
from fxsp.passes.rules.decide import Decision, replicate_all
from fxsp.passes.rules.dims import broadcast
from fxsp.passes.rules.rule import Dims, OpRule
from fxsp.passes.rules.table import rule
from fxsp.source import place
from fxsp.types import Length, Replicate, Sequence, Shard, Type, Used, as_length, same_length

__all__ = [
    "SDPA",
    "AttentionChoice",
    "decide_attention",
    "distributed_attention",
]


@dataclass(frozen=True)
class AttentionChoice:
    """The method of one attention; ``Decision.detail`` of its call.

    ``method`` is ``"local"``, ``"gather_kv"``, ``"ulysses"``, ``"ring"``, ``"hybrid"`` or ``"merged"``.
    """

    method: str
    op: AttentionOp
    #: The tokens of the queries, and of the keys and values (None: whole on every rank).
    queries: Sequence | None
    keys: Sequence | None
    #: Bytes that each rank sends, forward.
    sent: Length
    rejected: tuple[tuple[str, str], ...] = ()
    #: For the report: messages and time.
    detail: str = ""
    #: Ranks that exchange heads, and ranks in a ring.  ulysses is (P, 1), ring (1, P), hybrid has both above 1: ranks
    #: ``i*u .. (i+1)*u`` exchange heads, and pass keys and values on to the ranks ``u`` further.
    ulysses: int = 1
    ring: int = 1
    #: How often each key/value head is repeated for the query heads, and how often before the exchange already.
    repeat: int = 1
    spread: int = 1


def distributed_attention(*args: object, **kwargs: object) -> object:
    """Marks an attention between *partition* and *attention*: arguments by name, local; it is never called."""
    raise AssertionError("distributed_attention is lowered by the attention pass")


@rule([SDPA, BANDED])
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
    if call.get("is_causal") or call.get("window") is not None:
        whole.add("m")
    sizes |= {"m": q[-2], "n": k[-2], "d": q[-1], "e": v[-1]}
    operands: list[Dims] = [(*bq, ("m",), ("d",)), (*bk, ("n",), ("d",)), (*bv, ("n",), ("e",))]
    if isinstance(call.get("attn_mask"), Node):
        mask = call.shape("attn_mask")
        (dims,), _, _ = broadcast([mask], (*lead, q[-2], k[-2]), "m")
        names = {f"m{i}": f for i, f in enumerate([*(b[0] for b in batch), "m", "n"])}
        operands.append(tuple(tuple(names[f] for f in d) for d in dims))
    return OpRule(tuple(operands), ((*batch, ("m",), ("e",)),), sizes, whole=frozenset(whole))


def decide_attention(call: Call, types: list[Type], program: Program) -> Decision | None:
    """A decision where queries are split by tokens; None where the factor rule decides (split batch, whole queries).

    The program's ``ring_degree`` above 1 asks for a ring of so many ranks, each of them ``ulysses_degree`` ranks that
    exchange heads.  Keys and values among its outputs (the cache of a language model) become whole anyway: nothing else
    is sent then.
    """
    op = attention_op(call)
    if op is None or not any(isinstance(t, Shard) for t in types):
        return None
    names = (op.query, op.key, op.value)
    q, k, v = (op.laid(call.shape(name)) for name in names)
    given = dict(zip(call.operands, types, strict=True))
    q_type, *kv_types = (given[call[name]] for name in names)
    tokens = len(q) - 2 if op.heads_first else 1
    split = next((t for t in kv_types if isinstance(t, Shard)), None)
    if not isinstance(q_type, Shard) and split is not None and same_length(q[-2], k[-2]):
        # Whole queries (a part of them was rotated, say) beside split keys or values: a slice of them costs nothing.
        q_type = split
    if any(isinstance(t, Shard) and not (t.dim == tokens and t.plain) for t in kv_types):
        return None
    if isinstance(q_type, Replicate) and split is not None:
        return _whole_queries(call, op, types, kv_types, tokens, program)
    if not (isinstance(q_type, Shard) and q_type.dim == tokens and q_type.plain):
        return None
    if not len(q) == len(k) == len(v) or not all(same_length(a, b) for a, b in zip(k[:-1], v[:-1], strict=True)):
        return None  # broadcast in ways that no exchange knows
    _check_dropout(call, op, program)
    keys = next((t.sequence for t in kv_types if isinstance(t, Shard)), None)
    per_rows, why = op.rows_refusal(call, q, k), op.refusal(call)
    if len(q) != 4 and not op.builtin:
        why = f"{op.op} on queries of {len(q)} dimensions"
    if why:
        return replicate_all(call, types, why)
    mask = op.mask_in(call)
    mask_shape = call.shape(op.mask) if op.mask is not None and mask is not None else ()
    outputs = program.graph.output_node().all_input_nodes
    free = program.degrees.ulysses is None and program.degrees.ring is None and program.degrees.allgather is None
    if keys is None or (free and not per_rows and all(call[name] in outputs for name in (op.key, op.value))):
        if per_rows:
            return replicate_all(call, types, per_rows)
        sent, detail = (0, "") if keys is None else _of_outputs(call, op, kv_types, program)
        choice = AttentionChoice("local", op, q_type.sequence, None, sent, detail=detail)
    else:
        repeat = _repeats(call, kv_types) if op.builtin else 1
        if repeat > 1:
            k, v = ((s[0], as_length(s[1] // repeat), *s[2:]) for s in (k, v))
        question = Question(
            q, k, v, q_type.sequence, keys, call[op.query].meta["val"], repeat, program,
            causal=op.causal_in(call), per_rows=per_rows, blocks=_blocks_refusal(op),
        )  # fmt: skip
        best, rejected, detail = choose(question)
        if best is None:
            return replicate_all(call, types, "; ".join(why for _, why in rejected))
        choice = AttentionChoice(
            best.method, op, q_type.sequence, keys, best.sent, rejected, detail + _seen(call), best.ulysses, best.ring,
            repeat, best.spread,
        )  # fmt: skip
    kv: Type = Used() if choice.keys is None else Shard(tokens, choice.keys)
    needed: dict[str, Type] = {op.query: q_type, op.key: kv, op.value: kv}
    heads_split = choice.ulysses > 1 and choice.ring == 1
    for name, dim in op.per_head.items():
        needed[name] = _own_heads(call, name, dim) if heads_split and isinstance(call[name], Node) else Used()
    if op.mask is not None and mask is not None:
        needed[op.mask] = _mask_type(call, op.mask, choice, q, mask_shape)
    operands = tuple(needed[name] for name, value in call.arguments.items() if isinstance(value, Node))
    result: Type = Shard(tokens, q_type.sequence, origin=f"{call.op} by query tokens")
    results = tuple(result if i == op.output else Replicate() for i in range(len(call.result_shapes())))
    return Decision(operands, results, _reason(types, operands), detail=choice)


def _whole_queries(
    call: Call, op: AttentionOp, types: list[Type], kv_types: list[Type], tokens: int, program: Program
) -> Decision | None:
    """Whole queries beside split keys and values; None where the keys are had whole without communication."""
    q, k, v = (op.laid(call.shape(name)) for name in (op.query, op.key, op.value))
    outputs = program.graph.output_node().all_input_nodes
    parts = [call[name] for name, t in zip((op.key, op.value), kv_types, strict=True) if isinstance(t, Shard)]
    if all(facts(x).free or x in outputs for x in parts) or not len(q) == len(k) == len(v):
        return None
    if (len(q) != 4 and not op.builtin) or (op.dropout is not None and call.get(op.dropout)):
        return None  # whole dropout draws as one device does
    if not all(same_length(a, b) for a, b in zip(k[:-1], v[:-1], strict=True)):
        return None  # broadcast against each other
    (keys, *_) = (t.sequence for t in kv_types if isinstance(t, Shard))
    repeat = _repeats(call, kv_types) if op.builtin else 1
    if repeat > 1:
        k, v = ((s[0], as_length(s[1] // repeat), *s[2:]) for s in (k, v))
    window = "" if op.window_in(call) is None else "a window of whole queries is not computed by blocks of keys"
    question = Question(
        q, k, v, keys, keys, call[op.query].meta["val"], repeat, program, causal=op.causal_in(call),
        blocks=_blocks_refusal(op) or window,
    )  # fmt: skip
    best, rejected, detail = choose_for_whole_queries(question)
    choice = AttentionChoice(
        best.method, op, None, keys, best.sent, rejected, detail + _seen(call), repeat=repeat
    )  # fmt: skip
    whole: Type = Used() if best.method == "merged" else Replicate()
    needed: dict[str, Type] = {name: Shard(tokens, keys) for name in (op.key, op.value)}
    operands = tuple(needed.get(name, whole) for name, value in call.arguments.items() if isinstance(value, Node))
    results = tuple(Replicate(origin=f"{call.op} of whole queries") for _ in call.result_shapes())
    return Decision(operands, results, _reason(types, operands), detail=choice)


def _of_outputs(call: Call, op: AttentionOp, kv_types: list[Type], program: Program) -> tuple[Length, str]:
    """What keys and values cost that are gathered because they are outputs, too, and the sentence that says so."""
    size = program.ranks.size
    parts = [
        split_bytes(call.shape(name), t, call[name].meta["val"].element_size(), size)
        for name, t in zip((op.key, op.value), kv_types, strict=True)
        if isinstance(t, Shard)
    ]
    sent = as_length((size - 1) * sum(parts, start=0))
    return sent, "its keys and values are outputs of the graph, gathered once for both"


def _mask_type(call: Call, name: str, choice: AttentionChoice, q: tuple[Length, ...], mask: tuple[Length, ...]) -> Type:
    """What a rank needs of the mask."""
    if choice.ulysses == 1:
        assert choice.queries is not None
        return _mask_rows(mask, q, choice.queries)
    per_head = len(mask) >= 3 and not same_length(mask[-3], 1)
    return _own_heads(call, name, len(mask) - 3) if per_head and choice.ring == 1 else Used()


def _own_heads(call: Call, name: str, dim: int) -> Type:
    """A tensor with an entry for each head: those of a rank's own heads."""
    shape = call.shape(name)
    return Shard(dim % len(shape), Sequence.of(shape[dim]), origin=f"the {name} of a rank's own heads")


def _repeats(call: Call, kv_types: list[Type]) -> int:
    """How often keys and values repeat the heads of tensors that are split as they are; 1 if they do not."""
    found = set()
    for name, type_ in zip(("key", "value"), kv_types, strict=True):
        x, times = repeated_heads(call[name])
        if times > 1 and not type_of(x).same_as(type_):
            return 1
        found.add(times)
    return found.pop() if len(found) == 1 else 1


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


def _blocks_refusal(op: AttentionOp) -> str:
    """Why an attention cannot be computed block by block, or nothing."""
    return "" if op.blocks else f"blocks of {op.op} do not merge"


def _seen(call: Call) -> str:
    """For the report: what a mask was seen to be."""
    if call.op is not BANDED:
        return ""
    window = "" if call["window"] is None else f", a window of {call['window'] + 1} tokens"
    keys = ", one row of allowed keys" if isinstance(call["attn_mask"], Node) else ""
    return f"; its mask is causal{window}{keys}"


def _check_dropout(call: Call, op: AttentionOp, program: Program) -> None:
    """Refuses dropout that is active where nobody has said that another draw than one device's will do."""
    p = call.get(op.dropout) if op.dropout is not None else None
    if not p or (op.op is SDPA and program.options.rng == "per_rank"):
        return
    accept = ', or accept another draw: options={"rng": "per_rank"}' if op.op is SDPA else ""
    raise UnsupportedError(
        f"{call.op} in {place(call.node)}: attention dropout "
        f"({op.dropout}={p}) on split tokens cannot draw the same mask as one device. "
        f"Set the dropout of attention to 0, or call model.eval(){accept}."
    )
