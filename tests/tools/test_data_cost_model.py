"""The cost model of preparing documents, and the page that shows it."""

import json

import pytest

from tools.data_cost_model import RATES, main, stages


def test_the_page_has_the_tables_of_the_rates_that_are_committed(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['data_cost_model'])
    main()
    page = (RATES.parent / 'data_scale.md').read_text()
    for table in capsys.readouterr().out.strip().split('\n\n'):
        assert table.strip() in page


def test_stages_add_up():
    rates = json.loads(RATES.read_text())
    rows = {row.name: row for row in stages(rates, 1e12, kept=0.5, pairs=8.0, repeated=0.1, page=0.0)}
    archive = rates['archive']
    assert rows['read'].given == pytest.approx(archive['raw'] / archive['compressed'])
    assert rows['read'].hours == pytest.approx(archive['read'] / archive['compressed'] * 1e12 / 3600)
    text = archive['text'] / archive['compressed'] * 0.5
    words = rates['drivers']['words'] / rates['text'] * text * 1e12 * 0.1
    elements, size = rates['shuffles']['finish']['repeated']
    assert rows['finish: by repeated'].hours == pytest.approx(words * elements * rates['element'] / 3600)
    assert rows['finish: by repeated'].shuffled == pytest.approx(words * size / 1e12)
    fewer = {row.name: row for row in stages(rates, 1e12, kept=0.5, pairs=4.0, repeated=0.1, page=0.0)}
    assert fewer['stars: by edges'].shuffled == pytest.approx(rows['stars: by edges'].shuffled / 2)
    larger = {
        row.name: row for row in stages(rates, 1e12, 0.5, 8.0, 0.1, page=2 * archive['raw'] / archive['documents'])
    }
    assert larger['duplicates: by bands'].hours == pytest.approx(rows['duplicates: by bands'].hours / 2)


def test_the_model_holds_against_runs():
    """Time and bytes that are shuffled within a quarter, as the page says; not files of twenty pages."""
    rows = [row for row in json.loads(RATES.read_text())['validation'] if row['unit'] != 'MB']
    assert {row['unit'] for row in rows} == {'CPU s', 'MB shuffled'} and len(rows) == 8
    assert all(row['model'] == pytest.approx(row['measured'], rel=0.25) for row in rows)
