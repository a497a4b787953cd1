"""pyproject.toml's table of who may import whom names every package of llm, so lint-imports checks all of it."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def _layers() -> list[list[str]]:
    contracts = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool']['importlinter'][
        'contracts'
    ]
    (contract,) = (contract for contract in contracts if contract['type'] == 'layers')
    return [re.findall(r'[\w.]+', layer) for layer in contract['layers']]


def test_every_module_of_llm_is_in_a_layer():
    layered = {name for layer in _layers() for name in layer}
    found = {
        f'llm.{path.stem}'
        for path in (ROOT / 'llm').iterdir()
        if path.suffix == '.py' or (path.is_dir() and any(path.rglob('*.py')))
    } - {'llm.__init__'}
    # `scaling` is the one package whose parts are in different layers.
    split = {name.rpartition('.')[0] for name in layered} - {'llm'}
    for package in found & split:
        folder = ROOT / package.replace('.', '/')
        found |= {f'{package}.{path.stem}' for path in folder.glob('*.py')} - {f'{package}.__init__'}
    assert found - split <= layered


def test_every_folder_of_llm_with_code_is_a_package():
    folders = {path.parent for path in (ROOT / 'llm').rglob('*.py')}
    assert [folder for folder in folders if not (folder / '__init__.py').is_file()] == []


def test_layers_that_exist_are_not_optional():
    text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    optional = re.findall(r'\((llm\.[\w.]+)\)', text)
    exist = [name for name in optional if list((ROOT / 'llm').glob(f'{name[4:].replace(".", "/")}*'))]
    assert exist == []
