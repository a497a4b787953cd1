"""safetensors files: equal to the reference implementation's, and every lie in a header is found before a read."""

import json
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.interop.safetensors import INDEX, SINGLE, open_checkpoint, read_header
from llm.interop.safetensors_writing import NewTensor, write_checkpoint

TENSORS = {
    'b': np.arange(12, dtype=np.float32).reshape(3, 4),
    'a': np.arange(6, dtype=np.float16).reshape(2, 3),
    'c': np.arange(5).astype(ml_dtypes.bfloat16),
    'empty': np.zeros((0, 4), np.float32),
    'scalar': np.array(7.0, np.float32),
}
CODES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


def write(directory: Path, shard_bytes: int = 10**9) -> None:
    directory.mkdir(exist_ok=True)
    new = [NewTensor(n, x.shape, CODES[x.dtype.name], lambda x=x: x) for n, x in TENSORS.items()]
    write_checkpoint(directory, new, shard_bytes)


def raw(path: Path, header: object, data: bytes = b'', length: int | None = None) -> Path:
    """A file with this header, as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape=(1,), dtype='F32') -> dict:
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [start, stop]}


@pytest.mark.parametrize('shard_bytes', [10**9, 30])
def test_written_and_read_as_the_reference_implementation_does(tmp_path, shard_bytes):
    from safetensors.numpy import load_file

    write(tmp_path, shard_bytes)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert len(files) == (1 if shard_bytes > 100 else 2)
    theirs = {name: array for file in files for name, array in load_file(file).items()}
    ours = {name: tensor.read() for name, tensor in open_checkpoint(tmp_path).items()}
    assert theirs.keys() == ours.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            np.testing.assert_array_equal(found, expected)


def test_reads_what_the_reference_implementation_wrote(tmp_path):
    from safetensors.numpy import save_file

    save_file(TENSORS, tmp_path / SINGLE, metadata={'format': 'np'})
    for name, tensor in open_checkpoint(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), TENSORS[name])


# Each with what the one line says.
HOSTILE = {
    'overlap': ({'a': entry(0, 4), 'b': entry(2, 6)}, 8, 'the data of b overlaps others'),
    'same place': ({'a': entry(0, 4), 'b': entry(0, 4)}, 4, 'the data of b overlaps others'),
    'gap': ({'a': entry(0, 4), 'b': entry(8, 12)}, 12, 'the data of b leaves a gap'),
    'hole at the start': ({'a': entry(4, 8)}, 8, 'the data of a leaves a gap'),
    'too much data': ({'a': entry(0, 4)}, 40, 'bytes, the header says'),
    'cut short': ({'a': entry(0, 4)}, 2, 'bytes, the header says'),
    'absurd size': ({'a': entry(0, 2**62, (2**60,))}, 8, 'bytes, the header says'),
    'product beyond 64 bits': ({'a': entry(0, 0, (2**62, 2**62))}, 0, "'a' needs"),
    'number of many digits': (
        b'{"a": {"dtype": "F32", "shape": [' + b'9' * 5000 + b'], "data_offsets": [0, 4]}}',
        4,
        'it is not JSON',
    ),
    'size beyond 63 bits': ({'a': entry(0, 4, (2**63,))}, 4, "'a' has shape"),
    'negative': ({'a': entry(4, 0, (-1,))}, 4, "'a' has shape"),
    'backwards': ({'a': entry(4, 0)}, 4, "'a' needs 4 bytes and has -4"),
    'boolean': ({'a': {'dtype': 'F32', 'shape': [True], 'data_offsets': [0, 4]}}, 4, "'a' has shape"),
    'fraction': ({'a': {'dtype': 'F32', 'shape': [1.0], 'data_offsets': [0, 4]}}, 4, "'a' has shape"),
    'shape of text': ({'a': {'dtype': 'F32', 'shape': '1', 'data_offsets': [0, 4]}}, 4, "'a' has shape"),
    'wrong size': ({'a': entry(0, 8)}, 8, "'a' needs 4 bytes and has 8"),
    'unknown dtype': ({'a': entry(0, 4, dtype='F31')}, 4, "'a' has the unknown dtype 'F31'"),
    'dtype no text': ({'a': entry(0, 4, dtype=[1])}, 4, "'a' has the unknown dtype"),
    'missing field': ({'a': {'dtype': 'F32', 'shape': [1]}}, 4, "'a' does not have dtype, shape and data_offsets"),
    'extra field': ({'a': entry(0, 4) | {'more': 1}}, 4, "'a' does not have dtype, shape and data_offsets"),
    'no object': ([1], 0, 'it is no JSON object'),
    'metadata no strings': ({'__metadata__': {'a': 1}}, 0, '__metadata__ is not an object of strings'),
    'name twice': (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', 4, 'a name stands twice'),
    'not JSON': (b'{"a"', 4, 'it is not JSON'),
    'not UTF-8': (b'\xff\xfe{}', 4, 'it is not JSON'),
    'deep': (b'[' * 100_000, 0, 'it is not JSON'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_what_a_header_says_must_be_true(tmp_path, name):
    header, size, message = HOSTILE[name]
    path = raw(tmp_path / SINGLE, header, bytes(size))
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path)
    assert message in error.value.what and error.value.where == str(path) and '\n' not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize('length', [3, 10**8 + 1, 2**63, 2**64 - 1])
def test_header_that_does_not_fit_the_file_is_not_read(tmp_path, length):
    raw(tmp_path / SINGLE, {}, length=length)
    if length == 3:
        (tmp_path / SINGLE).write_bytes(b'\0\0\0')
    with pytest.raises(UserError, match='does not fit a file of'):
        open_checkpoint(tmp_path)


@settings(max_examples=200)
@given(place=st.integers(0, 400), bits=st.integers(1, 255), cut=st.booleans())
def test_damage_anywhere_in_a_header_is_an_error_or_changes_nothing_of_the_layout(tmp_path_factory, place, bits, cut):
    directory = tmp_path_factory.mktemp('damaged')
    write(directory)
    content = bytearray((directory / SINGLE).read_bytes())
    place %= len(content)
    if cut:
        content = content[:place]
    else:
        content[place] ^= bits
    (directory / SINGLE).write_bytes(content)
    try:
        found = read_header(directory / SINGLE)
    except UserError:
        return
    assert not cut and sum(tensor.read().nbytes for tensor in found.values() if tensor.code in CODES.values()) <= len(
        content
    )


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        ({'weight_map': {'a': '../a.safetensors'}}, 'no name of a safetensors file'),
        ({'weight_map': {'a': 'a.bin'}}, 'no name of a safetensors file'),
        ({'weight_map': {'a': 'b.safetensors'}}, 'cannot be read'),
        ({'weight_map': {'a': 'a.safetensors', 'b': 'a.safetensors'}}, 'b is not in a.safetensors'),
        ({'weight_map': {'b': 'a.safetensors'}}, 'does not say that a is in a.safetensors'),
        ({'weight_map': {'a': 1}}, 'no weight_map'),
        ({'metadata': {}}, 'no weight_map'),
    ],
)
def test_index_and_files_must_agree(tmp_path, index, message):
    raw(tmp_path / 'a.safetensors', {'a': entry(0, 4)}, bytes(4))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / 'harm', 'done'))

    (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r'pytorch_model\.bin is a pickle'):
        open_checkpoint(tmp_path)
    assert not (tmp_path / 'harm').exists()


def test_nothing_is_here(tmp_path):
    with pytest.raises(UserError, match=f'there is no {SINGLE}'):
        open_checkpoint(tmp_path)
