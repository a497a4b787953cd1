"""The container: files of the `gguf` package are read, and those that lie are refused before memory is spent."""

import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.interop.gguf.format import read_header


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> bytes:
    """A file that the package writes, with metadata of every type."""
    path = tmp_path_factory.mktemp('gguf') / 'a.gguf'
    writer = gguf.GGUFWriter(path, 'llama')
    for kind, value in {'uint8': 200, 'int8': -5, 'uint16': 60_000, 'int16': -7, 'uint32': 4_000_000_000}.items():
        getattr(writer, f'add_{kind}')(f'a.{kind}', value)
    for kind, value in {'int32': -9, 'uint64': 1 << 63, 'int64': -(1 << 40), 'float32': 0.5, 'float64': 0.1}.items():
        getattr(writer, f'add_{kind}')(f'a.{kind}', value)
    writer.add_bool('a.bool', True)
    writer.add_string('a.string', 'Äsop 🐢')
    writer.add_array('a.numbers', [1, -2, 3])
    writer.add_array('a.floats', [0.5, 1.5])
    writer.add_array('a.strings', ['x', '', 'Äsop'])
    writer.add_tensor('first', np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor('half', np.arange(64, dtype=np.float16).reshape(2, 32))
    blocks = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor('blocks', blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def written(folder, content: bytes):
    (folder / 'a.gguf').write_bytes(content)
    return folder / 'a.gguf'


def test_what_the_package_writes_is_read(whole, tmp_path):
    file = read_header(written(tmp_path, whole))
    values = {key.removeprefix('a.'): value for key, value in file.metadata.items() if key.startswith('a.')}
    numbers = {'uint8': 200, 'int8': -5, 'uint16': 60_000, 'int16': -7, 'uint32': 4_000_000_000, 'int32': -9}
    numbers |= {'uint64': 1 << 63, 'int64': -(1 << 40), 'float32': 0.5, 'float64': 0.1, 'bool': True}
    others = {'string': 'Äsop 🐢', 'numbers': [1, -2, 3], 'floats': [0.5, 1.5], 'strings': ['x', '', 'Äsop']}
    assert values == numbers | others
    assert np.array_equal(file.tensors['first'].read(), np.arange(6).reshape(2, 3))
    assert np.array_equal(file.tensors['half'].read(), np.arange(64).reshape(2, 32))
    np.testing.assert_allclose(file.tensors['blocks'].read(), np.ones((2, 64)), rtol=1e-3)


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    # The last tensor's padding may be missing.
    end = max(tensor.start + tensor.num_bytes for tensor in read_header(written(tmp_path, whole)).tensors.values())
    for length in [*range(0, end, 7), end - 1]:
        with pytest.raises(UserError, match=r'a\.gguf: '):
            read_header(written(tmp_path, whole[:length]))


HUGE = struct.pack('<Q', 1 << 62)


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        (b'GGUF\3', b'GGML\3', 'this is no GGUF file'),
        (b'GGUF\3', b'GGUF\1', 'it is of version 1, and 2 and 3 can be read'),
        (b'GGUF\3\0\0\0' + struct.pack('<Q', 3), b'GGUF\3\0\0\0' + HUGE, 'has no room for 4,611'),
        (struct.pack('<Q', 8) + b'a.string', HUGE + b'a.string', 'a name has 4,611,686'),
        (struct.pack('<IQ', 8, 10), struct.pack('<I', 8) + HUGE, 'the header goes on after its end'),
        (struct.pack('<IIQ', 9, 5, 3), struct.pack('<II', 9, 5) + HUGE, "'a.numbers' has no room for 4,611"),
        (struct.pack('<IIQ', 9, 8, 3), struct.pack('<II', 9, 8) + HUGE, "'a.strings' has no room for 4,611"),
        (struct.pack('<IIQ', 9, 8, 3), struct.pack('<IIQ', 9, 9, 3), "'a.strings' has the unknown type 9"),
        (struct.pack('<IIQ', 9, 8, 3), struct.pack('<IIQ', 77, 8, 3), "'a.strings' has the unknown type 77"),
        ('Äsop 🐢'.encode(), b'\xff\xfe\xfd' + 'op 🐢'.encode(), 'is not UTF-8'),
        (b'a.uint64', b'a.uint16', "the key 'a.uint16' stands twice"),
        (b'first' + struct.pack('<I', 2), b'first' + struct.pack('<I', 2000), "'first' has 2000 dimensions"),
        (b'first' + struct.pack('<IQ', 2, 3), b'first' + struct.pack('<IQ', 2, 0), r"'first' is F32 of shape \[2, 0\]"),
        (b'first' + struct.pack('<IQ', 2, 3), b'first' + struct.pack('<I', 2) + HUGE, "'first' is F32 of shape"),
        (struct.pack('<QQIQ', 3, 2, 0, 0), struct.pack('<QQIQ', 3, 2, 99, 0), "'first' is of type 99"),
        (struct.pack('<QQIQ', 3, 2, 0, 0), struct.pack('<QQIQ', 3, 2, 0, 5), 'overlaps others or is not aligned'),
        (struct.pack('<QQIQ', 3, 2, 0, 0), struct.pack('<QQIQ', 3, 2, 8, 0), r"'first' is Q8_0 of shape \[2, 3\]"),
        (struct.pack('<QQIQ', 3, 2, 0, 0), struct.pack('<QQIQ', 3, 2, 0, 1 << 40), 'ends at|overlaps'),
    ],
)
def test_what_a_file_claims_is_checked(whole, tmp_path, old, new, message):
    assert whole.count(old) == 1
    with pytest.raises(UserError, match=message):
        read_header(written(tmp_path, whole.replace(old, new)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200)
@given(data=st.data())
def test_any_damage_is_a_user_error_or_changes_no_more_than_values(whole, tmp_path, data):
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = read_header(written(tmp_path, bytes(content)))
    except UserError as error:
        assert '\n' not in str(error)
        return
    for tensor in file.tensors.values():
        assert tensor.read().nbytes <= 4 * 8 * len(content)


def test_lies_about_sizes_cost_no_memory(whole, tmp_path):
    path = written(tmp_path, whole.replace(struct.pack('<IIQ', 9, 5, 3), struct.pack('<IIQ', 9, 5, 1 << 40)))
    limit = 4 << 30
    code = (
        f'import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n'
        'from llm.errors import UserError\nfrom llm.interop.gguf.format import read_header\n'
        f'try: read_header({str(path)!r})\nexcept UserError as error: print(error)'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'has no room for 1,099,511,627,776 numbers' in run.stdout
