"""A small corpus as packed rows, and meshes to put its batches on."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm.data.packing import PackedRows, training_plan
from llm.data.sources import TextFiles
from llm.data.token_cache_building import open_token_cache
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from tests.data.byte_tokens import ByteTokens

SEQUENCE_LENGTH = 32
SEED = 17


def packed_rows(folder, name, documents, mode='best_fit', vocabulary=ByteTokens()):
    """Rows of SEQUENCE_LENGTH of so many documents, which begin with `name` and differ."""
    files = folder / name
    files.mkdir()
    text = '\n'.join(json.dumps({'text': f'{name} {i} ' + 'word ' * (i * 7 % 11)}) for i in range(documents))
    (files / 'part.jsonl').write_text(text)
    source = TextFiles(str(files / '*.jsonl'), validation_fraction=0.0)
    cache = open_token_cache(source, 'train', vocabulary, folder / 'cache', workers=1)
    return PackedRows(cache, training_plan(cache, SEQUENCE_LENGTH, mode, SEED), SEQUENCE_LENGTH)


def batch_sharding(**sizes):
    """Where a batch [B, S] lives on a mesh of these sizes, over the first devices."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    return NamedSharding(mesh, AxisRules().partition(('batch', 'sequence'), mesh, parameters=False))
