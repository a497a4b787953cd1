"""The tokenizers in GGUF files against llama.cpp's own, whose ids tools/gguf_reference.py keeps."""

import hashlib

import numpy as np
import pytest

from llm.errors import UserError
from llm.interop.gguf.format import read_header
from llm.interop.gguf.tokenizer import read_tokenizer
from llm.interop.gguf.writing import write_file
from tests.interop.gguf import small_vocabularies
from tests.interop.gguf.test_files import REFERENCE


@pytest.mark.oracle
@pytest.mark.parametrize('name', list(small_vocabularies.VOCABULARIES))
def test_ids_are_those_of_llama_cpp_and_a_vocabulary_comes_back(tmp_path, name):
    path = small_vocabularies.write(name, tmp_path)
    ours, back = small_vocabularies.VOCABULARIES[name](), read_tokenizer(read_header(path))
    for role in ('bos', 'eos', 'pad', 'unk'):
        # A document lies between two of the one there is.
        other = {'bos': ours.eos_id, 'eos': ours.bos_id}.get(role)
        wanted = getattr(ours, f'{role}_id')
        assert getattr(back, f'{role}_id') == (other if wanted is None else wanted)
    with np.load(REFERENCE) as kept:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == str(kept[f'{name}/vocabulary/digest'])
        for i, text in enumerate(small_vocabularies.TEXTS):
            theirs = kept[f'{name}/vocabulary/{i}'].tolist()
            assert list(ours.encode(text)) == theirs
            assert list(back.encode(text)) == theirs
            assert back.decode(theirs) == ours.decode(theirs)


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('t5', {'model': 'rwkv'}, "has a tokenizer of the kind 'rwkv'"),
        ('t5', {'tokens': []}, 'has no list of tokens'),
        ('t5', {'token_type': [1, 2]}, 'and no kind for each'),
        ('t5', {'scores': [1.0]}, 'and no score for each'),
        ('t5', {'unknown_token_id': 5000}, 'gives 5000 as unk'),
        ('t5', {'precompiled_charsmap': [1.5]}, 'has a precompiled_charsmap that is not of bytes'),
        ('gpt2', {'merges': ['a']}, 'has merges that are not pairs'),
        ('gpt2', {'pre': 'x'}, "how its tokenizer splits text, 'x', is not known"),
        ('bert', {'tokens': ['[PAD]', '[UNK]', 'a', 'a'], 'token_type': [3, 3, 1, 1]}, "has the token '##a' twice"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, change, message):
    metadata = read_header(small_vocabularies.write(name, tmp_path)).metadata
    changed = {f'tokenizer.ggml.{key}': value for key, value in change.items()}
    if 'tokens' in change:
        metadata = {key: value for key, value in metadata.items() if not key.endswith('_id')}
        changed['tokenizer.ggml.unknown_token_id'] = 1
    write_file(tmp_path / 'bad.gguf', metadata | changed, [])
    with pytest.raises(UserError, match=message) as error:
        read_tokenizer(read_header(tmp_path / 'bad.gguf'))
    assert '\n' not in str(error.value)
