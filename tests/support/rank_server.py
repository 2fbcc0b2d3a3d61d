"""Processes that have loaded what ranks need, and fork them: to start a rank then costs next to nothing.

:func:`connect` gives a connection to a new process that runs a function.  There are two servers, for ranks of even and
of odd number: what depends on the order of hashes, which is another one in each, is not alike on all ranks.  They start
when the first rank is asked for, end with the process that started them, and serve its children, too.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pickle
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["THRESHOLDS", "connect", "start"]

SERVERS = 2
#: Of the collector: graphs and fakes are made by the million, and few of them in cycles (a tenth of a test's time).
THRESHOLDS = (200_000, 20, 20)
#: Classes of the models in :mod:`models` and :mod:`zoo`; the libraries load a class when it is named.
DIFFUSERS = (
    "FluxTransformer2DModel Flux2Transformer2DModel WanTransformer3DModel QwenImageTransformer2DModel"
    " SD3Transformer2DModel PixArtTransformer2DModel CogVideoXTransformer3DModel HunyuanVideoTransformer3DModel"
    " LTXVideoTransformer3DModel"
)
TRANSFORMERS = (
    "LlamaForCausalLM BertModel GPT2LMHeadModel GemmaForCausalLM MixtralForCausalLM ViTForImageClassification"
)
#: Of our own, what functions that ranks are given import, and what ``fxsp`` itself loads when it is used.
MODULES = "fxsp.backend fxsp.offline.verify deferring distributed hook_parts training zoo"
#: Where the sockets of the servers are, for this process and its children.
FOLDER = "FXSP_TEST_RANK_SERVERS"


def _address(number: int) -> str:
    return str(Path(os.environ[FOLDER]) / str(number))


def _log(number: int) -> Path:
    return Path(f"{_address(number)}.log")


def start() -> None:
    """Start the servers, if there are none; they load, and this process goes on."""
    if FOLDER in os.environ:
        return
    folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="fxsp-ranks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number in range(SERVERS):
        with socket.socket(socket.AF_UNIX) as listener:  # connections wait in it until the server has loaded
            listener.bind(_address(number))
            listener.listen(128)
            path = os.pathsep.join(filter(None, sys.path))
            with _log(number).open("w") as log:  # the libraries that it loads say much that matters to nobody
                server = subprocess.Popen(
                    [sys.executable, __file__, str(listener.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno()],
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                )
        atexit.register(_end, server)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()


def connect(number: int, function: Callable[..., None], *args: Any) -> tuple[Connection, int]:
    """A connection to a new process, and its number: ``function(connection, *args)`` with this environment and output.

    The process ends with the function.  :class:`RuntimeError` if the server has ended.
    """
    start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(_address(number % SERVERS))
            socket.send_fds(client, [b"."], [1, 2])
            connection = Connection(client.detach())
        connection.send_bytes(pickle.dumps((dict(os.environ), sys.path, str(Path.cwd()))))
        connection.send_bytes(pickle.dumps((function, args)))
        return connection, pickle.loads(connection.recv_bytes())
    except (OSError, EOFError) as error:
        raise RuntimeError(f"a server of ranks has ended:\n{_log(number % SERVERS).read_text()}") from error


def _load() -> None:
    """Import what ranks would, and compile a graph: much of Dynamo is loaded only then.

    Without gradients: the threads that autograd starts would be missing in the children.
    """
    import diffusers
    import torch
    import torch._inductor.compile_fx
    import torch.distributed._functional_collectives
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import tqdm
    import transformers

    from small import SPLIT, Model, inputs

    tqdm.tqdm.monitor_interval = 0  # it would start a thread
    for module in MODULES.split():
        importlib.import_module(module)
    for names, library in ((DIFFUSERS, diffusers), (TRANSFORMERS, transformers)):
        for name in names.split():
            getattr(library, name)
    torch.set_num_threads(1)
    with torch.no_grad():
        torch.compile(Model(), backend="sp", options={"plan": SPLIT, "inner": "aot_eager"})(inputs())
    torch.compiler.reset()


def _serve(listener: socket.socket) -> None:
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # the process that started this one has ended
        client, _ = listener.accept()
        child = os.fork()
        if not child:
            listener.close()
            _run(client)
        client.close()
        children.add(child)
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}


def _run(client: socket.socket) -> None:
    """In the new process."""
    _, outputs, _, _ = socket.recv_fds(client, 1, 2)
    for ours, theirs in enumerate(outputs, 1):
        os.dup2(theirs, ours)
        os.close(theirs)
    connection = Connection(client.detach())
    environment, sys.path[:], folder = pickle.loads(connection.recv_bytes())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    connection.send_bytes(pickle.dumps(os.getpid()))
    function, args = pickle.loads(connection.recv_bytes())
    function(connection, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and taking down an interpreter full of torch takes seconds


if __name__ == "__main__":
    _load()
    gc.freeze()  # what is loaded stays shared with the children
    gc.set_threshold(*THRESHOLDS)
    _serve(socket.socket(fileno=int(sys.argv[1])))
