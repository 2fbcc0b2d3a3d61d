"""Each release of torch in the supported range that pip offers: its private names, and a part of the suite.

    python tests/support/torch_versions.py FOLDER [RELEASE ...] [-- TESTS ...]

makes an environment ``FOLDER/<release>`` for each (several GB where pip's build is one for CUDA; one that is there is
used again), with everything but torch and Triton from the environment that runs this, runs the probe, then TESTS.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from fxsp.torch_internals.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
#: What breaks first where torch has changed: capture, normalization, attention, a compiled model with its gradients.
CORE = (
    "tests/unit/test_torch_names.py",
    "tests/unit/test_capture.py",
    "tests/unit/test_size_nodes.py",
    "tests/passes/test_normalize.py",
    "tests/passes/test_functionalize.py",
    "tests/passes/test_emit.py",
    "tests/attention/test_attention.py",
    "tests/kernels/test_adjoints.py",
)


def releases(listed: str) -> list[str]:
    """The supported releases among those that ``pip index versions torch`` lists, the oldest first."""
    first, last = (tuple(map(int, version.split("."))) for version in SUPPORTED)
    found = {tuple(map(int, release)) for release in re.findall(r"\b(\d+)\.(\d+)\.(\d+)\b", listed)}
    return [".".join(map(str, release)) for release in sorted(found) if first <= release[:2] <= last]


def environment(folder: Path, release: str) -> Path:
    """The interpreter of an environment with this release of torch, made if it is not there."""
    python = folder / release / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / release], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={release}"], check=True)
    (site,) = (folder / release / "lib").glob("python*/site-packages")
    own = sysconfig.get_path("purelib")
    # After its own: torch, and the Triton that it asks for, are found first.  Then fxsp: an editable install is a hook.
    (site / "zz_shared.pth").write_text(f"import site; site.addsitedir({own!r})\n")
    return python


def main(arguments: list[str]) -> int:
    """Run it; the number of releases that fail."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    folder, *chosen = arguments[:split]
    tests = arguments[split + 1 :] or CORE
    listed = subprocess.check_output([sys.executable, "-m", "pip", "index", "versions", "torch"], text=True)
    failed = []
    for release in chosen or releases(listed):
        python = environment(Path(folder).resolve(), release)
        settings = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        probe = subprocess.run([python, "-m", "fxsp.torch_internals.probe"], cwd=folder, env=settings)
        # Not `python -m pytest`: that puts the top folder, with its `kernels`, on the path.
        call = "import sys, pytest; del sys.path[0]; sys.exit(pytest.main(sys.argv[1:]))"
        suite = subprocess.run([python, "-c", call, "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, env=settings)
        if probe.returncode or suite.returncode:
            failed.append(release)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
