"""Options of the compiler for programs that run once, on a few numbers: they compile in a third of the time."""

import importlib.metadata
from typing import Any

QUICKLY: dict[str, Any] = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 12):
    # Without an MLIR pipeline for each fusion; meshes then differ in the last bit. Later ones have no choice.
    QUICKLY['xla_cpu_use_fusion_emitters'] = False
