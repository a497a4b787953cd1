"""What README tells a reader to run exists, and .ci/run finds its two lines."""

import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = sorted(
    [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/**/*.md'), *ROOT.glob('experiments/**/*.md')]
)


def _code(text: str) -> str:
    return '\n'.join(re.findall(r'^```sh\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE))


def test_two_lines_do_all_of_their_own_set_up():
    set_up = [line for line in _code(README).splitlines() if 'pip install' in line]
    install = r'\.venv/bin/pip install --no-compile -c constraints/\$\(ls \.venv/lib\)\.txt -e \S+'
    pattern = rf'python3 -m venv \.venv && {install} && (.*)'
    commands = [re.fullmatch(pattern, line) for line in set_up]
    assert [command and command[1].split()[0] for command in commands] == ['.venv/bin/python', '.venv/bin/pytest']


def test_the_running_python_has_constraints():
    assert (ROOT / 'constraints' / f'python{sys.version_info.major}.{sys.version_info.minor}.txt').is_file()


def test_constraints_pin_exact_public_versions():
    for path in ROOT.glob('constraints/*.txt'):
        for line in path.read_text(encoding='utf-8').splitlines():
            assert re.fullmatch(r'#.*|[A-Za-z0-9._-]+==[0-9a-z.]+', line), f'{path.name}: {line}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_gin_files_links_and_tools_that_a_page_names_exist(page: pathlib.Path):
    text = page.read_text(encoding='utf-8')
    named = re.findall(r'--gin_file=(gin_configs/[\w/.-]+\.gin)', text)
    named += re.findall(r'(?<![\w/.-])((?:tools|tests|docs|experiments|llm|gin_configs|\.ci)/[\w/.-]*\w)', text)
    missing = [name for name in named if not (ROOT / name).exists()]
    links = re.findall(r'\]\((?!https?:|#|mailto:)([^)#\s]+)', text)
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing
