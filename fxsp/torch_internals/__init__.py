"""All contact with private torch API: one small, well-named function for each thing that is needed.

Nothing else in fxsp imports a name of torch that begins with an underscore.  What the files below define without an
underscore is the interface.  The versions that are supported are in ``versions.py``; ``probe.py`` looks up, in the
torch at hand, every name that is used here.
"""

# ruff: noqa: F403
from __future__ import annotations

from fxsp.torch_internals.compiled_modules import *
from fxsp.torch_internals.compilers import *
from fxsp.torch_internals.dynamo import *
from fxsp.torch_internals.eager import *
from fxsp.torch_internals.fakes import *
from fxsp.torch_internals.gradients import *
from fxsp.torch_internals.groups import *
from fxsp.torch_internals.logs import *
from fxsp.torch_internals.operators import *
from fxsp.torch_internals.recompiles import *
from fxsp.torch_internals.regions import *
from fxsp.torch_internals.subclasses import *
from fxsp.torch_internals.substitutes import *
from fxsp.torch_internals.symbols import *
from fxsp.torch_internals.trace import *
