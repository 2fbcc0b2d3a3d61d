"""Every name of torch that this folder uses, looked up in the torch that is installed.

``python -m fxsp.torch_internals.probe`` prints what is missing; it fails if something is that the code cannot do
without.  Dotted names (``torch._guards.TracingContext.try_get``) are read from the source of the folder, so none can be
forgotten.  What an object that torch hands out must have (``tx.output.root_tx``) is in the table :data:`ATTRIBUTES`; a
test sees that every private name in the folder is one or the other.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ATTRIBUTES", "Name", "dotted_names", "lacking", "names", "resolve"]

#: Class, function or module of torch -> attributes of it, of its instances, or variables of its code, that the folder
#: uses.  ``a|b``: one of them, by version; a name in brackets: the code goes on without.
ATTRIBUTES = {
    "torch.Tensor": "_backward_hooks _version",
    "torch.autograd.function.BackwardCFunction": "_forward_cls",
    "torch.fx.Node": "_rename",
    "torch.nn.Module": "_buffers _call_impl _wrapped_call_impl _forward_pre_hooks",
    "torch.distributed.ProcessGroup": "_get_backend _device_types",
    "torch._C.DispatchKey": "AutocastCPU AutocastCUDA AutocastXPU",
    "torch._C._functorch": (
        "_vmap_increment_nesting _vmap_decrement_nesting _grad_increment_nesting _grad_decrement_nesting "
        "_jvp_increment_nesting _jvp_decrement_nesting _func_increment_nesting _func_decrement_nesting"
    ),
    "torch._functorch.eager_transforms": "_autograd_grad",
    "torch._C._autograd": "_saved_tensors_hooks_disable _saved_tensors_hooks_enable",
    "torch._ops.OpOverload": (
        "_schema _overloadname _op_dk _can_decompose overloadpacket tags has_kernel_for_dispatch_key"
    ),
    "torch.library.CustomOpDef": "_opoverload",
    "torch._functorch._aot_autograd.runtime_wrappers": "_backward_impl",
    "torch._functorch._aot_autograd.utils": "_boxed_call",
    "torch.distributed.fsdp.FSDPModule": "_get_fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": "_fsdp_param_groups|_fsdp_param_group",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": "fsdp_params",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": "sharded_param _unsharded_param",
    "torch._dynamo.output_graph.OutputGraph": (
        "compiler_fn export current_tracer root_tx root_tracer side_effects guards compile_subgraph_reason "
        "_param_name_to_source|param_name_to_source _source_to_user_stacks|source_to_user_stacks"
    ),
    "torch._dynamo.output_graph.SubgraphTracer": "graph lifted_freevars bound_symbols",
    "torch._dynamo.output_graph.GraphCompileReason": "reason",
    "torch._dynamo.symbolic_convert.InstructionTranslatorBase": "f_code f_locals stack output",
    "torch._dynamo.symbolic_convert": "current_tx",
    "torch._dynamo.side_effects.SideEffects": "store_attr_mutations",
    "torch._dynamo.variables.VariableTracker": "source as_python_constant is_python_constant python_type_name",
    "torch._dynamo.variables.TensorVariable": "proxy",
    "torch._dynamo.variables.SymNodeVariable": "proxy",
    "torch._dynamo.variables.ConstantVariable": "value",
    "torch._dynamo.variables.ListVariable": "items",
    "torch._dynamo.variables.TupleVariable": "items",
    "torch._dynamo.variables.ConstDictVariable": "items",
    "torch._dynamo.variables.LazyVariableTracker": "is_realized realize peek_value",
    "torch._dynamo.variables.UserDefinedDictVariable": "[_base_vt|_dict_vt]",  # since 2.15 one is a ConstDictVariable
    "torch._dynamo.variables.UserDefinedTupleVariable": "[_base_vt|_tuple_vt]",
    "torch._dynamo.variables.nn_module.UnspecializedNNModuleVariable": "call_function value",
    "torch._dynamo.variables.UserFunctionVariable": "call_function fn self_args",
    "torch._dynamo.variables.TorchInGraphFunctionVariable": "call_function",
    "torch._dynamo.variables.BuiltinVariable": "[_lower_version_count_by_1]",
    "torch._dynamo.variables.builder.GraphArg": "example source",
    "torch._dynamo.variables.builder": "_dynamo_source|grapharg",
    "torch._dynamo.variables.higher_order_ops": "_checkpoint_context_fn",
    "torch._dynamo.eval_frame": "compile_wrapper|_fn [_torchdynamo_wrapper_id]",
    "torch._dynamo.resume_execution": "TORCH_DYNAMO_RESUME_IN_PREFIX",
    "torch._dynamo.convert_frame": "compiler_fn code recompile_reason _torchdynamo_orig_backend",
    "torch._dynamo.backends.distributed.DDPOptimizer": "backend_compile_fn",
    "torch._TorchCompileInductorWrapper": "config",
    "torch._TorchCompileWrapper": "compiler_fn kwargs",
    "torch.distributed.distributed_c10d": "default_pg_timeout",
    "torch.distributed.ProcessGroupGloo": "options",
    "torch.distributed.ProcessGroupGloo._Options": "_timeout",
    "torch._guards.TracingContext": "fake_mode tensor_to_context",
    "torch._guards.Guard": "name",
    "torch._subclasses.fake_tensor.FakeTensor": "fake_mode item_memo",
    "torch._subclasses.fake_tensor.FakeTensorMode": "from_tensor shape_env",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv": (
        "backed_var_to_val|var_to_val divisible replacements guards replace"
    ),
    "torch.fx.experimental.symbolic_shapes.StatefulSymbolicContext": "tensor_source",
    "torch.fx.experimental.sym_node.SymNode": "hint has_hint expr",
    "torch.fx.experimental.proxy_tensor.ProxyTorchDispatchMode": "tracer [decomposition_table]",
    "torch.fx.experimental.proxy_tensor.PythonKeyTracer": "tensor_tracker unwrap_proxy create_proxy",
    "torch._higher_order_ops.triton_kernel_wrap.KernelSideTable": "get_kernel get_constant_args",
    "torch.utils.checkpoint._CachingTorchDispatchMode": "policy_fn",
}


@dataclass(frozen=True)
class Name:
    """A name that the folder uses, and the line; an ``optional`` one has a substitute, or the code goes on without."""

    path: str
    where: str
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.path} ({self.where}{', optional' if self.optional else ''})"


def names() -> list[Name]:
    """All names that the folder uses: those read from its files, and those of :data:`ATTRIBUTES`."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path != Path(__file__))
    found = [name for path in files for name in dotted_names(path.read_text(), path.name)]
    found += [
        Name(f"{owner}.{text.strip('[]')}", Path(__file__).name, optional=text.startswith("["))
        for owner, attributes in ATTRIBUTES.items()
        for text in attributes.split()
    ]
    return list(dict.fromkeys(found))


def lacking() -> list[Name]:
    """The names that the installed torch does not have."""
    return [name for name in names() if not _there(name.path)]


def resolve(path: str) -> Any:
    """What a dotted name means, importing the modules on its way; raises ImportError or AttributeError if nothing."""
    value: Any = torch
    done = "torch"
    for part in path.split(".")[1:]:
        done = f"{done}.{part}"
        if isinstance(value, types.ModuleType) and not hasattr(value, part):
            importlib.import_module(done)
        if not isinstance(value, threading.local):  # has what a thread gave it
            value = getattr(value, part)
    return value


def _there(path: str) -> bool:
    owner, _, attribute = path.rpartition(".")
    try:
        if owner in ATTRIBUTES:
            value = resolve(owner)
            return any(hasattr(value, name) or name in _spoken(value) for name in attribute.split("|"))
        resolve(path)
    except (ImportError, AttributeError):
        return False
    return True


def _spoken(owner: Any) -> set[str]:
    """The names in the code of a class (of its bases, too), module or function: what an instance gets is among them."""
    owners = owner.__mro__ if isinstance(owner, type) else [owner]
    found: set[str] = set()
    for each in owners:
        found |= set(getattr(each, "__annotations__", ()))
        for value in (each, *vars(each).values()) if hasattr(each, "__dict__") else ():
            if isinstance(value, type) and not isinstance(owner, type) and value.__module__ == owner.__name__:
                found |= _spoken(value)
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if isinstance(code, types.CodeType):
                found.update(_words(code))
    return found


def _words(code: types.CodeType) -> Iterator[str]:
    yield code.co_name
    yield from (*code.co_names, *code.co_varnames, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        elif isinstance(constant, str):
            yield constant


def dotted_names(source: str, file: str) -> list[Name]:
    """The dotted names in a file's source that begin at ``torch``, through its imports and its short names for them."""
    reader = _Reader(file)
    reader.visit(ast.parse(source))
    # `torch.fx` of `torch.fx.Node` is part of it.
    return [name for name in dict.fromkeys(reader.found) if name.path != "torch"]


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self._file = file
        self._short: dict[str, str] = {}
        self._optional = False
        self.found: list[Name] = []

    def _see(self, path: str, node: ast.AST, optional: bool = False) -> None:
        self.found.append(Name(path, f"{self._file}:{getattr(node, 'lineno', 0)}", optional or self._optional))

    def _path(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._short.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self._path(node.value)) is not None:
            return f"{base}.{node.attr}"
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._short = self._short, dict(self._short)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self._short.pop(argument.arg, None)
        self.generic_visit(node)
        self._short = outer

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == "torch":
                self._see(alias.name, node)
                self._short[alias.asname or "torch"] = alias.name if alias.asname else "torch"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                self._see(f"{node.module}.{alias.name}", node)
                self._short[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                path = self._path(node.value)
                self._short.pop(target.id, None)
                if path is not None:
                    self._short[target.id] = path

    def visit_Try(self, node: ast.Try) -> None:
        caught = {word.id for h in node.handlers if h.type for word in ast.walk(h.type) if isinstance(word, ast.Name)}
        raises = any(isinstance(inner, ast.Raise) for handler in node.handlers for inner in ast.walk(handler))
        outer = self._optional
        self._optional = outer or (bool(caught & {"ImportError", "AttributeError"}) and not raises)
        for inside in node.body:
            self.visit(inside)
        self._optional = outer
        for after in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(after)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) >= 2:
            base, name = self._path(node.args[0]), node.args[1]
            if base is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._see(f"{base}.{name.value}", node, optional=len(node.args) == 3)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is None:
            self.generic_visit(node)
        else:
            self._see(path, node)


def main() -> int:
    """Print what the installed torch lacks; 1 if that is something without a substitute."""
    known, gone = names(), lacking()
    needed = [name for name in gone if not name.optional]
    lines = [f"torch {torch.__version__}: {len(known)} names, {len(gone)} missing, {len(needed)} of these needed"]
    sys.stdout.write("\n".join([*lines, *(f"  {name}" for name in gone)]) + "\n")
    return int(bool(needed))


if __name__ == "__main__":
    sys.exit(main())
