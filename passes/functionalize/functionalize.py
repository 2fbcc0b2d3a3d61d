"""No operator writes to a tensor any more, but for a ``copy_`` at the end to each graph input that was written to.

Input::

    %out : call_function[target=aten.empty_like.default](args = (%x,))
    %even : call_function[target=aten.slice.Tensor](args = (%out, 1, 0, 9223372036854775807, 2))
    %c : call_function[target=aten.copy_.default](args = (%even, %a))
    %odd : call_function[target=aten.slice.Tensor](args = (%out, 1, 1, 9223372036854775807, 2))
    %d : call_function[target=aten.copy_.default](args = (%odd, %b))
    return (%out,)

Output::

    %stack : call_function[target=aten.stack.default](args = ([%a, %b], 2))
    %flatten : call_function[target=aten.flatten.using_ints](args = (%stack, 1, 2))
    return (%flatten,)

How: a *storage* is the tensor that owns memory, and its present value, a node.  A *tensor* is a storage and the chain
of views that leads from it.  A write through a tensor computes the value by the functional operator and puts it into
the storage, view by view; a later read of another tensor of the same storage looks at it anew.  Storages that nobody
writes to are left alone, so a graph without in-place operators is returned as it is.  Whether two values share memory
is read from the fakes (``reshape`` may copy), how they share it from the operator.

Gradients are those of eager mode: each write is a differentiable operator.  Raises :class:`UnsupportedError` for a
write by an operator that is not known, through a view that is not known, or through ``detach`` while gradients are
recorded.

Torch's own functionalization in the re-trace (``FunctionalTensorMode(pre_dispatch=True, export=True)`` of torch 2.13)
is no substitute: the halves above become ``slice_scatter`` of uninitialized memory, not a ``stack``; a write through
``detach`` is not refused and comes out without history; ``chunk``, ``reshape`` and ``contiguous`` are taken apart.
"""

from __future__ import annotations

import operator
from collections import Counter
from itertools import count
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp import torch_internals
from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.passes.base import Pass, Program
from fxsp.passes.builder import Writer, erase_unused, memory_order
from fxsp.passes.functionalize.inplace import NEW_VIEW, functional_value, gives_memory, written_arguments
from fxsp.passes.functionalize.storages import Storage, Tensor, all_keys, keys_of, same_strides
from fxsp.passes.functionalize.views import View, cover, view_of
from fxsp.passes.graph import facts, reachable
from fxsp.source import describe

__all__ = ["Functionalize", "functionalize"]

aten = torch.ops.aten


class Functionalize(Pass):
    """After this pass nothing is written to but inputs, at the end; where that cannot be, the graph runs whole."""

    def apply(self, program: Program) -> Program:
        try:
            program.gm = functionalize(program.gm)
        except UnsupportedError as error:
            raise RunsWhole(str(error)) from error
        return program


def functionalize(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``gm`` (as *normalize* returns it) without in-place operators; the graph is changed in place."""
    keys = all_keys(gm.graph)
    memory = [node for node in gm.graph.nodes if gives_memory(node)]
    written = {key for node in gm.graph.nodes if node not in memory for a in written_arguments(node) for key in keys[a]}
    for node in memory:
        if not written.isdisjoint(keys[written_arguments(node)[0]]):
            raise UnsupportedError(f"{describe(node)} gives an input other memory; it is written to in place, too")
    if written:
        _Functionalizer(gm, keys, written).run()
        erase_unused(gm.graph)
        for node in memory:  # the values that are written in the end are made before
            gm.graph.output_node().prepend(node)
        gm.graph.lint()
        gm.recompile()
    return gm


class _Functionalizer:
    def __init__(self, gm: torch.fx.GraphModule, keys: dict[Node, set[int]], written: set[int]) -> None:
        self.gm = gm
        #: The storages of each node's value, and those that are written to somewhere, as keys.
        self.keys = keys
        self.written = written
        #: All fakes of the graph: a key means something only as long as its storage lives.
        self.alive = [v for n in gm.graph.nodes for v in tree_leaves(n.meta.get("val"))]
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.w = Writer(gm.graph, next(m for v in self.alive if (m := torch_internals.fake_mode_of(v)) is not None))
        self.training = torch.is_grad_enabled() and any(
            getattr(p.meta["val"], "requires_grad", False) for p in self.inputs
        )
        #: A node -> the tensor that it stands for, if its storage is written to somewhere.
        self.tensors: dict[Node, Tensor] = {}
        #: Storage key -> the storage.
        self.storages: dict[int, Storage] = {}
        #: A node with several results, views of one tensor -> that tensor's node, and the version they show.
        self.several: dict[Node, tuple[Node, int]] = {}
        self.clock = count(1)
        self.started = False
        #: Some strides are not what they were.
        self.moved = False

    def run(self) -> None:
        nodes = list(self.gm.graph.nodes)
        for node in nodes:
            self.w.at(node)
            if node.op not in ("placeholder", "get_attr") and not self.started:
                self._start()
            if node.op == "output":
                self._finish(node)
            elif written_arguments(node) and not gives_memory(node):
                self._write(node)
            elif not self.written.isdisjoint(self.keys[node]):
                self._alias(node)
            elif any(n in self.tensors for n in node.all_input_nodes):
                self._read_arguments(node)
        for node in reversed(nodes):
            if written_arguments(node) and not gives_memory(node):
                node.replace_all_uses_with(written_arguments(node)[0])  # only in views that nobody looks at
                self.gm.graph.erase_node(node)

    def _start(self) -> None:
        """While gradients are recorded, an input that is overwritten at the end is copied at the start.

        Its value may be saved for the backward pass.
        """
        self.started = True
        for storage in self.storages.values():
            if self.training:
                storage.value = self._laid_out(self.w.call(aten.clone.default, storage.value), storage.root)
                tensor = self.tensors[storage.root]
                tensor.seen = storage.value

    # --- reading

    def _read_arguments(self, node: Node) -> None:
        node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), self._read)

    def _read(self, node: Node) -> Node:
        tensor = self.tensors.get(node)
        return node if tensor is None else self._look(tensor)

    def _look(self, tensor: Tensor) -> Node:
        """A node that has the present value of a tensor."""
        if tensor.seen is None or tensor.version != tensor.storage.version:
            value = self._settle(tensor.storage)
            with self.w.on_behalf_of(tensor.node):
                for view in tensor.chain:
                    value = view.see(self.w, value)
            tensor.seen, tensor.version = value, tensor.storage.version
        return tensor.seen

    def _settle(self, storage: Storage) -> Node:
        """The present value of a storage, with all writes done."""
        if storage.pending:
            with self.w.on_behalf_of(storage.writer):
                self._write_pending(storage)
        return storage.value

    def _write_pending(self, storage: Storage) -> None:
        pieces = [(view.piece, value) for view, value in storage.pending]
        shape = storage.root.meta["val"].shape
        size = shape[pieces[0][0].dim] if pieces[0][0] is not None else None
        value = cover(self.w, size, pieces)
        if value is None:
            value = storage.value
            for view, part in storage.pending:
                value = view.put(self.w, value, part)
        storage.value = self._laid_out(value, storage.root)
        storage.pending.clear()

    def _laid_out(self, value: Node, like: Node) -> Node:
        """``value`` with the strides of ``like``, so that what is known of views of it stays true."""
        if same_strides(value, like):
            return value
        tensor = like.meta["val"]
        known = all(isinstance(stride, int) for stride in tensor.stride())
        value = self.w.dense(value, memory_order(tensor) if known else list(range(tensor.ndim)))
        self.moved |= not same_strides(value, like)
        return value

    # --- views

    def _alias(self, node: Node) -> None:
        """A node that makes, or is a view of, a tensor that is written to somewhere."""
        source, index = node, None
        if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
            source, index = node.args[0], node.args[1]
        whole, version = self.several.get(source) or (self._whole(source, self.keys[node]), None)
        if whole is None:
            self._new_storage(node)
            return
        storage = self.tensors[whole].storage
        if isinstance(node.meta["val"], (list, tuple)):
            self.several[node] = (whole, storage.version)
            self._read_arguments(node)
            return
        view = view_of(source, whole, index) if torch_internals.is_operator(source.target) else None
        view = view or _unknown(source)
        chain = self.tensors[whole].chain
        tensor = Tensor(storage, chain if view.identity else (*chain, view), node)
        self._add(node, tensor)
        if index is None and not storage.pending:
            self._read_arguments(node)
            if storage.version:
                self.w.refresh(node)
            tensor.seen, tensor.version = node, storage.version
        elif index is not None and version == storage.version:
            tensor.seen, tensor.version = node, storage.version

    def _whole(self, node: Node, keys: set[int]) -> Node | None:
        """The argument of which a node is a view."""
        return next((n for n in node.all_input_nodes if n in self.tensors and self.keys[n] & keys), None)

    def _new_storage(self, node: Node) -> None:
        self._read_arguments(node)
        if isinstance(node.meta["val"], (list, tuple)):
            return  # its results are taken out of it by getitem
        (key,) = self.keys[node]
        if key in self.storages:
            raise UnsupportedError(f"{describe(node)} shares memory that is written to in place, in an unknown way")
        self.storages[key] = Storage(node, node)
        self._add(node, Tensor(self.storages[key], (), node, 0, node))

    def _add(self, node: Node, tensor: Tensor) -> None:
        self.tensors[node] = tensor
        tensor.storage.tensors += 1

    # --- writes

    def _write(self, node: Node) -> None:
        targets = written_arguments(node)
        namespace, _, name = torch_internals.schema(node.target).name.partition("::")
        if len(targets) != 1 or namespace != "aten" or targets[0] not in (*node.args, *node.kwargs.values()):
            raise UnsupportedError(f"{describe(node)} writes to its arguments in a way that is not known")
        tensor = self.tensors[targets[0]]
        if name == "detach_":
            self._detach(tensor)
        elif name in NEW_VIEW:
            # The same memory, the variable sees it differently from now on.
            change = view_of(node, tensor.node) or _unknown(node)
            pure = getattr(getattr(aten, name.removesuffix("_")), torch_internals.overload_name(node.target))
            args = node.args[1:]
            see = lambda w, base: w.call(pure, base, *args)  # noqa: E731
            tensor.chain = (*tensor.chain, View(see, change.put, complete=True))
            tensor.node, tensor.seen = node, None
        else:
            value = functional_value(self.w, node, tensor.node, self._read)
            self._put(tensor, value)
        self.tensors[node] = tensor

    def _detach(self, tensor: Tensor) -> None:
        if tensor.storage.tensors == 1 and not tensor.chain:
            tensor.storage.value = self.w.call(aten.detach.default, self._settle(tensor.storage))
            tensor.seen, tensor.version = tensor.storage.value, tensor.storage.version
        elif self.training and self._has_history(self._settle(tensor.storage)):
            raise UnsupportedError(f"{describe(self.w.origin)} detaches, in place, a tensor that has views")

    def _has_history(self, value: Node) -> bool:
        """Whether a value depends on an input that requires grad."""
        return any(
            node.op == "placeholder" and getattr(node.meta["val"], "requires_grad", False)
            for node in reachable([value], lambda n: n.all_input_nodes)
        )

    def _put(self, tensor: Tensor, value: Node) -> None:
        storage = tensor.storage
        written = value
        storage.first = storage.first or next(self.clock)
        storage.writer = self.w.origin
        if self.training and any(view.detaches for view in tensor.chain):
            raise UnsupportedError(f"{describe(self.w.origin)} writes through detach() while gradients are recorded")
        # From the innermost view outwards; what is around a view has to be looked at unless the view is all of it.
        for depth in range(len(tensor.chain) - 1, 0, -1):
            around = self._around(storage, tensor.chain[:depth])
            value = tensor.chain[depth].put(self.w, around, value)
        if not tensor.chain:
            storage.value, storage.pending = self._laid_out(value, storage.root), []
        elif tensor.chain[0].complete:
            value = tensor.chain[0].put(self.w, storage.value, value)
            storage.value, storage.pending = self._laid_out(value, storage.root), []
        else:
            storage.pending.append((tensor.chain[0], value))
        storage.version += 1
        if tensor.chain and same_strides(written, tensor.node):
            tensor.seen, tensor.version = written, storage.version

    def _around(self, storage: Storage, chain: tuple[View, ...]) -> Node:
        value = self._settle(storage)
        for view in chain:
            value = view.see(self.w, value)
        return value

    # --- the end

    def _finish(self, output: Node) -> None:
        results = list(dict.fromkeys(n for n in tree_leaves(output.args) if isinstance(n, Node)))
        epilogue = [s for s in self.storages.values() if s.version and s.root.op in ("placeholder", "get_attr")]
        epilogue.sort(key=lambda s: s.first)
        for storage in epilogue:
            if storage.root.op == "get_attr":
                raise UnsupportedError(f"{storage.root.target}, a constant of the graph, is written to in place")
        # Values that the epilogue would overwrite before they are used are copied first.
        doomed = {key for s in epilogue for key in self.keys[s.root]}
        finals = [self._settle(s) for s in epilogue]
        finals = [
            v if doomed.isdisjoint(keys_of(v)) else self._clone(v, s.writer)
            for v, s in zip(finals, epilogue, strict=True)
        ]
        after = [n for n in results if n in self.tensors and self.tensors[n].storage in epilogue]
        new = self._results([n for n in results if n not in after], results)
        for storage, value in zip(epilogue, finals, strict=True):
            with self.w.on_behalf_of(storage.writer):
                storage.value = self.w.write(aten.copy_.default, storage.root, value)
            storage.value.meta["val"] = storage.root.meta["val"]
            storage.version += 1
        new.update({n: self._read(n) for n in after})
        output.args = torch.fx.map_arg(output.args, new.__getitem__)
        if self.moved:
            self._propagate(new)

    def _clone(self, value: Node, origin: Node | None) -> Node:
        with self.w.on_behalf_of(origin):
            return self.w.call(aten.clone.default, value)

    def _results(self, nodes: list[Node], results: list[Node]) -> dict[Node, Node]:
        """The values of outputs, which share memory with inputs and with each other as they did before."""
        uses = Counter(key for node in results for key in self.keys[node])
        owner = {key: {key} for p in self.inputs for key in self.keys[p]}
        new: dict[Node, Node] = {}
        for node in nodes:
            if node in self.tensors and any(uses[key] > 1 for key in self.keys[node]):
                self.tensors[node].seen = None  # look at the storage itself, as the other views of it do
            value = self._read(node)
            if any(owner.setdefault(key, self.keys[node]) != self.keys[node] for key in keys_of(value)):
                value = self._clone(value, node)
            new[node] = value
        return new

    def _propagate(self, new: dict[Node, Node]) -> None:
        """Compute all values anew, since some strides have changed; those of the outputs may not."""
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and not written_arguments(node) and not facts(node).island:
                self.w.refresh(node)
        for before, now in new.items():
            if isinstance(before.meta["val"], torch.Tensor) and not same_strides(before, now):
                raise UnsupportedError(f"{describe(before)}: the memory layout of this output cannot be kept")


def _unknown(node: Node) -> View:
    def refuse(*_: Any) -> Node:
        raise UnsupportedError(
            f"a tensor is written to in place, and {describe(node)} has a view of it that is not known"
        )

    return View(refuse, refuse)
