"""Has llama.cpp load the GGUF files of tests/interop/gguf, and keeps its logits and ids for the tests.

    pip install llama-cpp-python       (builds llama.cpp: 7 minutes of processor time)
    PYTHONPATH=. python tools/gguf_reference.py tests/interop/gguf/llama_cpp.npz

The tests compare the files that they write with the digests kept here, so what llama.cpp loaded is what is written.
"""

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.gguf import small_models, small_vocabularies


def main(target: str) -> None:
    """Write the logits of every model in its types, and the ids of texts by every vocabulary."""
    import llama_cpp

    kept: dict[str, Any] = {'version': np.array(llama_cpp.__version__)}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in small_models.files():
            path = small_models.write(name, dtype, Path(folder))
            length = small_models.LENGTH
            # Its cache of keys and values is fp16 by default.
            exact = {'type_k': llama_cpp.GGML_TYPE_F32, 'type_v': llama_cpp.GGML_TYPE_F32}
            model = llama_cpp.Llama(str(path), n_ctx=length, logits_all=True, verbose=False, **exact)
            ids = small_models.token_ids()
            model.eval(ids)
            key = f'{name}/{dtype}'
            kept[f'{key}/digest'] = np.array(hashlib.sha256(path.read_bytes()).hexdigest())
            kept[f'{key}/logits'] = np.array(model.scores[: len(ids)][small_models.KEPT], np.float32)
            print(key, kept[f'{key}/logits'].std())
        for name in small_vocabularies.VOCABULARIES:
            path = small_vocabularies.write(name, Path(folder))
            model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
            kept[f'{name}/vocabulary/digest'] = np.array(hashlib.sha256(path.read_bytes()).hexdigest())
            for i, text in enumerate(small_vocabularies.TEXTS):
                ids = model.tokenize(text.encode(), add_bos=False, special=False)
                kept[f'{name}/vocabulary/{i}'] = np.array(ids, np.int32)
            print(name, kept[f'{name}/vocabulary/0'])
    np.savez_compressed(target, **kept)


if __name__ == '__main__':
    main(*sys.argv[1:])
