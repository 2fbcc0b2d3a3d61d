"""Attention: how scaled dot product attention runs on split tokens.

The decision is made where types are known (*propagate*): of the methods (:mod:`fxsp.passes.attention.methods`) that are
legal the costs decide.  The nodes are written by *lower_attention* once the graph is local.

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

Without a ring an attention sees keys and values in their original order, whole and without pads, so masks and the
causal flag keep their global meaning; a mask is cut by query rows or by heads, never reordered.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.errors import UnsupportedError
from fxsp.kernels.counts import split_bytes
from fxsp.passes.attention.choose import choose
from fxsp.passes.attention.degrees import note_degree
from fxsp.passes.attention.methods import METHODS
from fxsp.passes.attention.operators import ATTENTION_OPS, BANDED, SDPA, AttentionOp
from fxsp.passes.attention.question import AttentionChoice, Question
from fxsp.passes.attention.repeat_kv import repeated_heads
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, mark, type_of
from fxsp.passes.rules.decide import Decision, replicate_all
from fxsp.passes.rules.dims import aligned
from fxsp.passes.rules.notation import Pattern
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import rule
from fxsp.passes.special.dropout import BY_POSITION
from fxsp.passes.special.special import Local, Special
from fxsp.report import AttentionRecord
from fxsp.source import module_path, node_source, place
from fxsp.types import Length, Replicate, Shard, Type, as_length, same_length

__all__ = ["SDPA", "Attention", "distributed_attention"]


def distributed_attention(*args: object, **kwargs: object) -> object:
    """Marks an attention between *partition* and *attention*: arguments by name, local; it is never called."""
    raise AssertionError("distributed_attention is lowered by the attention pass")


_RULE = Pattern.parse("[*b, m, d], [*b, n, d], [*b, n, e] -> [*b, m, e] whole={d, e, n}")


@rule([SDPA, BANDED])
def sdpa(call: Call) -> OpRule | None:
    """Batch and query rows pass, these where nothing counts them: ``whole={d, e, n}``."""
    (out,), (q, k, v) = call.result_shapes(), (call.shape(name) for name in ("query", "key", "value"))
    found = _RULE.fit([q, k, v], [out])
    if found is None:
        return None
    (*batch, rows, _), operands, whole, sizes = found.results[0], list(found.operands), found.whole, found.sizes
    if call.get("enable_gqa") and batch:
        # Query heads share key heads: the head dimension cannot be cut factor by factor.
        operands[1:] = ((*dims[:-3], ("hk",), *dims[-2:]) for dims in operands[1:] if dims is not None)
        whole, sizes = whole | {"hk", *batch[-1]}, sizes | {"hk": k[-3]}
    if call.get("is_causal") or call.get("window") is not None:
        whole |= {"m"}
    if isinstance(call.get("attn_mask"), Node):
        mask = call.shape("attn_mask")
        scores = list(zip((*batch, rows, ("n",)), (*out[:-1], k[-2]), strict=True))[len(out) - len(mask) :]
        operands.append(tuple(f if aligned(n, size) else () for n, (f, size) in zip(mask, scores, strict=True)))
    return replace(found, operands=tuple(operands), whole=whole, sizes=sizes)


class Attention(Special):
    """Every attention of split tokens, by the method that is chosen for it."""

    ops = ATTENTION_OPS

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        """A decision where queries or keys are split by tokens; None where the factor rule decides.

        Degrees among the program's options ask for a method.
        """
        op = ATTENTION_OPS[call.op]
        given = dict(zip(call.operands, types, strict=True))
        q_type, *kv_types = (given[call[name]] for name in (op.query, op.key, op.value))
        q, k, v = (op.laid(call.shape(name)) for name in (op.query, op.key, op.value))
        tokens = len(q) - 2 if op.heads_first else 1
        keys = next((t for t in kv_types if isinstance(t, Shard)), None)
        if not isinstance(q_type, Shard) and keys is not None and same_length(q[-2], k[-2]):
            # Whole queries (a part of them was rotated, say) beside split keys or values: a slice costs nothing.
            q_type = keys
        if any(isinstance(t, Shard) and not (t.dim == tokens and t.plain) for t in (q_type, *kv_types)):
            return None
        if not len(q) == len(k) == len(v) or not all(same_length(a, b) for a, b in zip(k[:-1], v[:-1], strict=True)):
            return None  # broadcast in ways that no exchange knows
        blocks, per_rows, outputs = "" if op.blocks else f"blocks of {op.op} do not merge", "", None
        kept = program.graph.output_node().all_input_nodes
        if isinstance(q_type, Shard):
            _check_dropout(call, op, program)
            per_rows, why = op.rows_refusal(call, q, k), op.refusal(call)
            if len(q) != 4 and not op.builtin:
                why = f"{op.op} on queries of {len(q)} dimensions"
            if why:
                return replicate_all(call, types, why)
            free = program.degrees == AttentionDegrees() and not per_rows
            if keys is not None and free and call[op.key] in kept and call[op.value] in kept:
                outputs, keys = _of_outputs(call, op, kv_types, program), None
        elif keys is None or not _may_stay_whole(call, op, kv_types, kept):
            return None
        elif op.window_in(call) is not None:
            blocks = blocks or "a window of whole queries is not computed by blocks of keys"
        repeat = _repeats(call, kv_types) if keys is not None and op.builtin else 1
        if repeat > 1:
            k, v = ((s[0], as_length(s[1] // repeat), *s[2:]) for s in (k, v))
        queries = q_type.sequence if isinstance(q_type, Shard) else None
        question = Question(
            q, k, v, queries, keys.sequence if keys is not None else None, call[op.query].meta["val"], repeat, program,
            op.causal_in(call), per_rows, blocks, outputs, op.window_in(call),
        )  # fmt: skip
        best, rejected, detail = choose(question)
        if best is None:
            return replicate_all(call, types, "; ".join(why for _, why in rejected))
        if keys is not None:
            note = "the queries are whole on every rank" if queries is None else ""
            detail = "; ".join(filter(None, (detail, note, _seen(call))))
        choice = AttentionChoice(best, op, queries, question.keys, repeat, rejected, detail)
        needed = METHODS[best.method].needs(call, choice, q_type, tokens)
        operands = tuple(needed[name] for name, value in call.arguments.items() if isinstance(value, Node))
        whole: Type = Replicate(origin=f"{call.op} of whole queries" if queries is None else "")
        out = whole if queries is None else Shard(tokens, queries, origin=f"{call.op} by query tokens")
        results = tuple(out if i == op.output else whole for i in range(len(call.result_shapes())))
        return Decision(operands, results, _reason(types, operands), detail=choice, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node | list[Node | None]:
        choice, report, node = decision.detail, local.program.report, call.node
        arguments = local.arguments(call, decision)
        if choice.op.dropout is not None and arguments.get(choice.op.dropout):
            report.note(BY_POSITION)
        note_degree(local.program, node, choice.method, choice.rejected)
        detail = "; ".join(filter(None, [choice.detail, METHODS[choice.method].work(call, choice)]))
        place = module_path(node) or report.root, node_source(node)
        record = AttentionRecord(*place, choice.method, choice.way.sent, choice.rejected, detail)
        report.attentions.append(record)
        new = local.build.call(distributed_attention, **arguments)
        mark(new, attention=choice, attention_record=record)
        if isinstance(node.meta["val"], (tuple, list)):
            return [new if i == choice.op.output else None for i in range(len(node.meta["val"]))]
        return new


def _may_stay_whole(call: Call, op: AttentionOp, kv_types: list[Type], outputs: list[Node]) -> bool:
    """Whether whole queries may look at split keys; not where the keys are had whole without communication."""
    parts = [call[name] for name, t in zip((op.key, op.value), kv_types, strict=True) if isinstance(t, Shard)]
    if all(facts(x).free or x in outputs for x in parts) or (len(call.shape(op.query)) != 4 and not op.builtin):
        return False
    return op.dropout is None or not call.get(op.dropout)  # whole dropout draws as one device does


def _of_outputs(call: Call, op: AttentionOp, kv_types: list[Type], program: Program) -> Length:
    """What keys and values cost that are gathered because they are outputs, too."""
    size = program.ranks.size
    parts = [
        split_bytes(call.shape(name), t, call[name].meta["val"].element_size(), size)
        for name, t in zip((op.key, op.value), kv_types, strict=True)
        if isinstance(t, Shard)
    ]
    return as_length((size - 1) * sum(parts, start=0))


def _repeats(call: Call, kv_types: list[Type]) -> int:
    """How often keys and values repeat the heads of tensors that are split as they are; 1 if they do not."""
    found = set()
    for name, type_ in zip(("key", "value"), kv_types, strict=True):
        x, times = repeated_heads(call[name])
        source = type_of(x)
        if times > 1 and not (isinstance(source, Shard) and source.same_as(type_)):
            return 1
        found.add(times)
    return found.pop() if len(found) == 1 else 1


def _reason(types: list[Type], needed: tuple[Type, ...]) -> str:
    """Why an operand that is split is needed otherwise."""
    for name, have, want in zip(("query", "key", "value", "mask"), types, needed, strict=False):
        if isinstance(have, Shard) and not have.same_as(want):
            return f"the {name} of the attention is {have}, and is needed as {want}"
    return ""


def _seen(call: Call) -> str:
    """For the report: what a mask was seen to be."""
    if call.op is not BANDED:
        return ""
    window = "" if call["window"] is None else f", a window of {call['window'] + 1} tokens"
    keys = ", one row of allowed keys" if isinstance(call["attn_mask"], Node) else ""
    return f"its mask is causal{window}{keys}"


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
