"""The report on prepared documents: its figures against the files counted here, and its page in a browser."""

import json
import random
import subprocess
import sys
from collections import Counter

import pyarrow.parquet
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from llm.configuration import Invocation
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.decontamination import Decontamination, EvaluationSet, NgramShare
from llm.data.documents.language import Language
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.outliers import Outliers
from llm.data.documents.quality.rules import Rules
from llm.data.documents.reporting.config import DataReport
from llm.data.documents.sources.records import JsonLines
from llm.data.documents.tokens import TokenCount
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.jobs.prepare_data import PrepareData
from llm.jobs.report_data import ReportData

CALL = Invocation(dry_run=False, operative_config='', command=(), config_files=())
WORDS = (
    *(
        'the',
        'river',
        'was',
        'of',
        'stone',
        'and',
        'that',
        'house',
        'to',
        'be',
        'with',
        'have',
        'seen',
        'morning',
        'under',
    ),
    *('light', 'people', 'walked', 'along', 'water', 'where', 'children', 'played', 'until', 'evening', 'came', 'over'),
)
# Markup that must stay text, an override of direction, a lone surrogate, and an address that must not be a link.
NASTY = (
    '</pre><script>document.title = "broken"</script><img src="http://127.0.0.1:9/x.png"> \u202eabc \ud800 & "quotes"'
)
ITEM = 'a question that nobody should train on because the answer of it is known to all who read this sentence here'


def _texts(generator):
    yield from (' '.join(generator.choices(WORDS, k=n)) for n in [*range(2, 60, 2), *range(60, 400, 20)])


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp('prepared')
    generator = random.Random(0)
    ByteVocabulary().save(root / 'bytes')
    web = [
        {'id': f'w{i}', 'text': text, 'url': f'https://site{i % 3}.example/{i}', 'date': f'20{10 + i % 4}-05-01'}
        for i, text in enumerate(_texts(generator))
    ]
    long = ' '.join(generator.choices(WORDS, k=120))
    web.append(
        {'id': 'nasty', 'text': f'{NASTY} {long}', 'url': 'javascript:document.title="broken"', 'license': '<b>'}
    )
    web += [{'id': f'copy{i}', 'text': f'{web[-2]["text"]} {word}'} for i, word in enumerate(('stone', 'light'))]
    web.append({'id': 'leak', 'text': f'{ITEM} {" ".join(generator.choices(WORDS, k=40))}'})
    notes = [{'id': f'n{i}', 'text': text} for i, text in enumerate(_texts(generator))]
    notes.append({'id': 'german', 'text': 'Der Hund lief durch den Garten und die Katze sah ihm lange zu. ' * 4})
    (root / 'web.jsonl').write_text('\n'.join(map(json.dumps, web)) + '\n{"broken": \n')
    (root / 'notes.jsonl').write_text('\n'.join(map(json.dumps, notes)))
    (root / 'eval.jsonl').write_text(json.dumps({'question': ITEM}))
    job(root, root / 'out')(CALL)
    return root / 'out'


def job(root, output, min_words=20, **fields):
    return PrepareData(
        output_directory=str(output),
        sources=tuple(JsonLines(name=name, files=str(root / f'{name}.jsonl')) for name in ('web', 'notes')),
        stages=(
            Language(languages=('en',)),
            Rules((GopherQuality(min_words=min_words), Outliers(min_characters=60))),
            TokenCount(str(root / 'bytes')),
        ),
        processes=1,
        **{
            'deduplication': Deduplication(),
            'decontamination': Decontamination((EvaluationSet(str(root / 'eval.jsonl')),), (NgramShare(),)),
            'report': DataReport(clusters=4, token_bytes=10_000),
            **fields,
        },
    )


@pytest.fixture(scope='module')
def rows(directory):
    """The ledger, with what became of each document over all shards."""
    verdicts = {
        row['id']: row for path in directory.glob('verdicts/*') for row in pyarrow.parquet.read_table(path).to_pylist()
    }
    rows = [row for path in directory.glob('ledger/*') for row in pyarrow.parquet.read_table(path).to_pylist()]
    for row in rows:
        row['outcome'] = row['removed_by'] or verdicts[row['id']]['rule']
        row['against'] = [name[:-5] for name, keep in row.items() if name.endswith('.keep') and not keep]
    return rows


@pytest.fixture(scope='module')
def report(directory):
    return json.loads((directory / 'report.json').read_text())


def _sums(rows):
    return {
        'documents': len(rows),
        'characters': sum(row['characters'] for row in rows),
        'tokens': sum(int(row['tokens.value']) for row in rows),
    }


def test_figures_are_those_of_the_files(report, rows):
    totals = report['totals']
    assert totals['read'] == len(rows) + 1 and totals['quarantined'] == 1
    assert totals['judged'] == _sums(rows)
    assert totals['stays'] == _sums([row for row in rows if row['outcome'] is None])
    removing = set()
    for rule in report['rules']:
        name = rule['rule']
        for kind in ('source', 'language'):
            for group in {row[kind] for row in rows}:
                own = [row for row in rows if row[kind] == group]
                expected = {'first': [row for row in own if row['outcome'] == name]}
                expected['at_all'] = [row for row in own if name in row['against'] or row['outcome'] == name]
                expected['only'] = [row for row in expected['at_all'] if set(row['against']) <= {name}]
                if expected['at_all']:
                    removing.add(name)
                    assert rule['by'][kind][group] == {which: _sums(some) for which, some in expected.items()}
                else:
                    assert group not in rule['by'][kind]
        if figure := rule.get('histogram'):
            values = [(row[f'{name}.value'], row[f'{name}.keep']) for row in rows]
            assert sum(figure['kept']) == sum(keep for value, keep in values if value is not None)
            assert sum(figure['removed']) == sum(not keep for value, keep in values if value is not None)
    assert {
        'language',
        'gopher_quality/word_count',
        'outliers/characters',
        'near_duplicate',
        'contamination',
    } <= removing
    for kind, of in (('domain', lambda row: row['domain']), ('year', lambda row: row['date'] and row['date'][:4])):
        found = {row['name']: row['judged']['documents'] for row in report['groups'][kind]}
        assert found == Counter(of(row) or 'unknown' for row in rows)
    assert report['contamination']['sets'][0]['samples'][0]['id'] == 'leak'
    assert sum(cluster['documents'] for cluster in report['clusters']['clusters']) == len(rows)
    assert {fit['bytes_per_token'] for fit in report['tokenizer']['source'].values()} == {1.0}


def test_bars_are_on_one_side_of_a_bound_and_samples_next_to_it(report, rows):
    rule = next(rule for rule in report['rules'] if rule['rule'] == 'gopher_quality/word_count')
    assert rule['bounds'] == [[20, 100_000, '']]
    figure = rule['histogram']
    for kept, removed, (start, end) in zip(
        figure['kept'][1:-1],
        figure['removed'][1:-1],
        zip(figure['edges'], figure['edges'][1:], strict=False),
        strict=True,
    ):
        assert not (kept and removed)
        assert not removed or end <= 20 or start >= 100_000
    samples = report['samples']['rules']['gopher_quality/word_count']
    name = 'gopher_quality/word_count'
    alone = sorted(20 - row[f'{name}.value'] for row in rows if row['against'] == [name])
    others = sorted(20 - row[f'{name}.value'] for row in rows if name in row['against'] and len(row['against']) > 1)
    nearest = [*alone, *others]
    assert alone and others
    assert sorted(20 - sample['value'] for sample in samples['just_removed']) == nearest[:3]
    kept = sorted(row[f'{name}.value'] for row in rows if not row['against'])
    assert sorted(sample['value'] for sample in samples['just_kept']) == kept[:3]
    group = next(group for group in report['duplicates'] if group['rules'] == {'near_duplicate': 2})
    changed = {tuple(part) for member in group['members'] for part in member['differences'] if part[0] == 'changed'}
    assert {'stone', 'light'} & {text.strip() for _, *texts in changed for text in texts}


def test_other_bounds_give_what_a_run_with_them_gives(directory, tmp_path, capsys):
    other = tmp_path / 'other'
    job(directory.parent, other, min_words=31, deduplication=None, decontamination=None, report=None)(CALL)
    assert not (other / 'report.html').exists()
    capsys.readouterr()
    ReportData(str(directory), bounds=(('gopher_quality/word_count', 31, 100_000),))(CALL)
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: [int(figure.replace(',', '')) for figure in line.split()[1:]] for line in lines[1:4]}
    counts = json.loads((other / 'summary.json').read_text())
    before = json.loads((directory / 'summary.json').read_text())
    for name, some in (*counts['sources'].items(), ('all', counts['counts'])):
        now = before['counts' if name == 'all' else 'sources']
        now = now if name == 'all' else now[name]
        assert said[name][:4] == [now['kept'], some['kept'], 0, now['kept'] - some['kept']]
    assert said['all'][3] > 0
    for name in ('word_count', 'gopher_quality/wordcount'):
        with pytest.raises(UserError, match=r"no stage has a rule '.*'\. Did you mean gopher_quality/word_count\?"):
            ReportData(str(directory), bounds=((name, 31, None),))(CALL)
    with pytest.raises(UserError, match='no figure is from 3 to 2'):
        ReportData(str(directory), bounds=(('tokens', 3, 2),))
    with pytest.raises(UserError, match='holds no run'):
        ReportData(str(tmp_path))(CALL)


def test_nothing_removed_from_one_source_is_said_without_jax(tmp_path):
    (tmp_path / 'kept.jsonl').write_text(json.dumps({'text': 'a text that stays'}))
    source = JsonLines(name='kept', files=str(tmp_path / 'kept.jsonl'))
    PrepareData(str(tmp_path / 'kept'), (source,), (), report=None, processes=1)(CALL)
    code = (
        'import sys; from llm.configuration import Invocation; from llm.jobs.report_data import ReportData\n'
        "ReportData(sys.argv[1])(Invocation(False, '', (), ()))\n"
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'kept')]
    (line,) = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    page = tmp_path / 'kept' / 'report.html'
    assert line.startswith(f'{page}: done in ') and '1 source<' in page.read_text()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = '/usr/bin/chromium'
    for flag in (
        'headless',
        'no-sandbox',
        'disable-gpu',
        'disable-quic',
        'no-first-run',
        'disable-background-networking',
        'disable-component-update',
        'disable-sync',
        f'user-data-dir={tmp_path_factory.mktemp("chromium")}',
    ):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService('/usr/bin/chromedriver'))
    yield driver
    driver.quit()


def test_page_in_a_browser(browser, directory, report, rows):
    address = (directory / 'report.html').as_uri()
    browser.get('about:blank')
    browser.get_log('performance')  # of the browser's own first page
    browser.get(address)
    for width in (400, 1280):
        # A window of Chromium is not made narrower than 500.
        browser.execute_cdp_cmd(
            'Emulation.setDeviceMetricsOverride',
            {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False},
        )
        browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        widths = browser.execute_script(
            'return ["innerWidth"].map(name => window[name]).concat('
            '["clientWidth", "scrollWidth"].map(name => document.documentElement[name]))'
        )
        assert widths[0] == width and widths[1] == widths[2] > 0.9 * width
    sections = {part.get_attribute('id') for part in browser.find_elements(By.TAG_NAME, 'section')}
    assert sections >= {'funnel', 'rules', 'figures', 'groups', 'samples', 'duplicates', 'contamination', 'clusters'}
    assert sections >= {'tokens', 'quarantine'}
    links = [link.get_attribute('href') for link in browser.find_elements(By.TAG_NAME, 'a')]
    assert all(browser.find_elements(By.ID, link.partition('#')[2]) for link in links if link.startswith(address))
    assert any(link.startswith('https://site') for link in links) and not any('javascript' in link for link in links)

    def table(name):
        found = browser.execute_script(
            'return [...document.getElementById(arguments[0]).tBodies[0].rows].filter(row => !row.hidden)'
            '.map(row => [...row.cells].map(cell => cell.innerText))',
            name,
        )
        return {cells[0]: cells[1:] for cells in found}

    # The rules, of all documents and of a source.
    for choice, own in (('', rows), ('source notes', [row for row in rows if row['source'] == 'notes'])):
        Select(browser.find_element(By.CSS_SELECTOR, '[data-rows-of]')).select_by_value(choice)
        shown = {rule: int(cells[1].replace(',', '')) for rule, cells in table('rules-table').items()}
        assert {rule: count for rule, count in shown.items() if count} == Counter(
            r['outcome'] for r in own if r['outcome']
        )
    # The funnel ends with what stays, in documents and in tokens.
    stays = [row for row in rows if row['outcome'] is None]
    *_, last = table('funnel-table').values()
    assert last[1] == f'{len(stays):,}'
    Select(browser.find_element(By.CSS_SELECTOR, '[data-measure-of]')).select_by_value('tokens')
    *_, last = table('funnel-table').values()
    assert last[1] == f'{sum(int(row["tokens.value"]) for row in stays):,}'
    # Sorting, and the filters of documents.
    browser.find_element(By.CSS_SELECTOR, '#rules-table thead th:nth-child(5)').click()
    at_all = [int(cells[3].replace(',', '')) for cells in table('rules-table').values()]
    assert at_all == sorted(at_all, reverse=True) and len(set(at_all)) > 1
    Select(browser.find_element(By.CSS_SELECTOR, '[data-filter=outcome]')).select_by_value('language')
    visible = browser.execute_script(
        "return [...document.querySelectorAll('.browser article')].filter(part => !part.hidden)"
        '.map(part => part.innerText)'
    )
    assert visible and all('Der Hund' in text or 'language' in text for text in visible)
    assert any(
        'broken' in text
        for text in browser.execute_script("return [...document.querySelectorAll('pre')].map(part => part.textContent)")
    )
    assert browser.title == 'out'
    assert [entry for entry in browser.get_log('browser') if entry['level'] != 'INFO'] == []
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = {e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent'}
    assert asked == {address}

    # Without scripts all is there but the controls.
    browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': True})
    browser.get(address)
    assert f'{len(rows) + 1:,}' in browser.find_element(By.CSS_SELECTOR, '.figures').text
    assert not any(part.is_displayed() for part in browser.find_elements(By.CLASS_NAME, 'controls'))
    assert browser.find_element(By.CSS_SELECTOR, '.browser article').is_displayed()
