import json, re
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from telemetry_loop.config import TelemetryError
from telemetry_loop.report import checked_parameters, headline, index, known_reports, page, render, to_html

@pytest.fixture
def desk(tmp_path, monkeypatch): # a folder with one report that draws a picture
    monkeypatch.chdir(tmp_path); (tmp_path/'reports').mkdir()
    cells = [new_markdown_cell('# Does it hold?', id='a'), new_code_cell("k: int = 3 # how many\nword: str = 'rows' # of what\nshare: float = .5 # of them", id='b', metadata={'tags': ['parameters']}),
             new_code_cell("from IPython.display import Markdown\nMarkdown(f'**Yes**, {k} {word}.')", id='c'),
             new_code_cell('import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 1)); ax.plot([1, 2]); plt.show()', id='d'), new_markdown_cell('## Caveats\n\nSmall $n$.', id='e')]
    write(tmp_path/'reports/00_hold.ipynb', cells)
    return tmp_path

def write(path, cells): nbformat.write(new_notebook(cells=cells, metadata={'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}), path)

def test_two_renderings_are_equal_and_stand_alone(desk):
    first = render('00_hold', {'k': '4'}).read_bytes(); book = (desk/'artifacts/reports/00_hold.ipynb').read_bytes()
    assert render('00_hold', {'k': '4'}).read_bytes() == first and (desk/'artifacts/reports/00_hold.ipynb').read_bytes() == book
    html = first.decode()
    assert 'Yes</strong>, 4 rows.' in html and 'data:image/png;base64,' in html and 'Caveats' in html
    assert not re.search(r'<script|<link|@import|url\(|(src|href)="(https?:)?//', html)
    assert 'plt.subplots' not in html and 'k: int' not in html and 'k = 4' not in html
    nb = nbformat.reads(book.decode(), as_version=4); nbformat.validate(nb)
    assert 'papermill' not in json.dumps(nb.metadata) + json.dumps([c.metadata for c in nb.cells])

@pytest.mark.parametrize('given,words', [({'j': '1'}, ["'j'", 'k, word, share']), ({'k': 'many'}, ['k', "'many'", 'int']), ({'k': 'true'}, ['int']), ({'share': 'half'}, ['float'])])
def test_unknown_and_mistyped_parameters_are_refused(desk, given, words):
    with pytest.raises(TelemetryError) as e: render('00_hold', given)
    assert all(w in str(e.value) for w in words) and not (desk/'artifacts').exists()

def test_text_parameters_stay_text(desk):
    assert checked_parameters('reports/00_hold.ipynb', {'word': '12', 'share': '1'}) == {'word': '12', 'share': 1}

def test_unknown_report_names_the_known(desk):
    assert known_reports() == ['00_hold']
    with pytest.raises(TelemetryError, match="'07_none'.*00_hold"): render('07_none')

def test_a_report_that_stops_leaves_the_last_page(desk):
    good = render('00_hold').read_bytes()
    write(desk/'reports/00_hold.ipynb', [new_markdown_cell('# Does it hold?'), new_code_cell("raise ValueError('no evidence\\nat all')")])
    with pytest.raises(TelemetryError) as e: render('00_hold')
    assert str(e.value) == 'report 00_hold stopped: ValueError: no evidence'
    assert (desk/'artifacts/reports/00_hold.html').read_bytes() == good

def test_index_shows_title_and_first_line(desk):
    with pytest.raises(TelemetryError, match='no reports'): index()
    render('00_hold'); (desk/'artifacts/reports/01_more.html').write_text(page('More', '<h1>More &amp; more</h1><p>Not <b>yet</b>.</p>'))
    first = index().read_bytes()
    assert index().read_bytes() == first
    html = first.decode()
    assert [m for m in re.findall(r'href="([^"]+)">([^<]+)</a><p>([^<]+)</p>', html)] == [('00_hold.html', 'Does it hold?', 'Yes, 3 rows.'), ('01_more.html', 'More &amp; more', 'Not yet.')]

def test_markup_in_a_title_is_text():
    nb = new_notebook(cells=[new_markdown_cell('# A <b>bold</b> title')])
    assert '<title>A &lt;b&gt;bold&lt;/b&gt; title</title>' in to_html(nb)
    assert headline(to_html(nb))[0] == 'A bold title'
