"The rules of the house. Each is a function from a root folder to a list of complaints; each is also broken once, on a copy, to show that it bites."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PACKAGE = 'telemetry_loop'
VERB_MODULE = {'index': 'report', 'train --variant': 'ablate'} # verbs that live in another chapter's module

# ---------------------------------------------------------------- reading the house
def chapters(root): # -> {module: (number, notebook path)}
    return {m[2]: (int(m[1]), p) for p in sorted((root/'nbs').glob('*.ipynb')) if (m := re.fullmatch(r'(\d\d)_(\w+)\.ipynb', p.name))}

def cells(path): return [dict(c, source=''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

def is_code(cell): return cell['cell_type'] == 'code'

def directives(cell): return re.findall(r'^#\|\s*(\S+)', cell['source'], re.M)

def tree(source): # of a cell; shell and magic lines are blanked
    return ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))

def imported(node): # -> modules of the package that this code imports
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.ImportFrom):
            path = (PACKAGE + ('.' + n.module if n.module else '')) if n.level else n.module or ''
            if path == PACKAGE: found |= {a.name for a in n.names}
            elif path.startswith(PACKAGE + '.'): found.add(path.split('.')[1])
        elif isinstance(n, ast.Import): found |= {a.name.split('.')[1] for a in n.names if a.name.startswith(PACKAGE + '.')}
    return found

def modules(root): # -> {module: syntax tree}
    return {p.stem: ast.parse(p.read_text(encoding='utf-8')) for p in sorted((root/PACKAGE).glob('*.py')) if not p.stem.startswith('_')}

def closure(name, trees): # the module and all it imports, however far
    todo, found = [name], set()
    while todo:
        if (now := todo.pop()) in found or now not in trees: continue
        found.add(now); todo += imported(trees[now])
    return found

# ---------------------------------------------------------------- the rules
def imports_point_down(root):
    found, numbered = [], chapters(root)
    def check(name, node, where):
        for other in imported(node) & set(numbered) | {o for o in imported(node) if (root/PACKAGE/f'{o}.py').exists()}:
            if other not in numbered: found.append(f'{where} imports {other}, which has no chapter')
            elif numbered[other][0] > numbered[name][0] or (other == name and where.endswith('.py')): found.append(f'{where} imports {other}, a chapter that is not below it')
    for name, node in modules(root).items():
        if name not in numbered: found.append(f'{name}.py has no chapter nbs/NN_{name}.ipynb')
        else: check(name, node, f'{name}.py')
    for name, (_, path) in numbered.items():
        for c in cells(path):
            if is_code(c): check(name, tree(c['source']), path.name)
    numbers = [n for n, _ in numbered.values()]
    return found + [f'two chapters have number {n:02}' for n in set(numbers) if numbers.count(n) > 1]

def stage_deps_are_closures(root):
    if not (root/'dvc.yaml').exists(): return ['there is no dvc.yaml']
    found, trees, sections = [], modules(root), yaml.safe_load((root/'params.yaml').read_text())
    for stage, body in yaml.safe_load((root/'dvc.yaml').read_text())['stages'].items():
        body = body.get('do', body)
        cmd = re.match(r'telemetry-loop (\w[\w-]*(?: --variant)?)', body['cmd'])
        if not cmd: found.append(f'{stage} runs {body["cmd"]!r}; a stage is a verb of telemetry-loop'); continue
        name = VERB_MODULE.get(cmd[1], cmd[1])
        if name not in trees: found.append(f'{stage} runs the verb {name!r}, which has no module'); continue
        deps = [d if isinstance(d, str) else next(iter(d)) for d in body.get('deps', [])]
        used = closure(name, trees)
        if any(d.startswith('reports/') for d in deps): # a report stage runs its notebooks, so what they import counts too
            used |= {m for p in (root/'reports').glob('*.ipynb') for c in cells(p) if is_code(c) for i in imported(tree(c['source'])) for m in closure(i, trees)}
        code, want = {d for d in deps if d.startswith(PACKAGE + '/')}, {f'{PACKAGE}/{m}.py' for m in used}
        found += [f'{stage} lacks the dependency {d}' for d in sorted(want - code)] + [f'{stage} depends on {d}, which it does not import' for d in sorted(code - want)]
        inputs = [d for d in deps if d not in code]
        found += [f'{stage} reads {d}, which is neither data, a plan, a stage output, a report nor a release' for d in inputs
                  if not re.match(r'(data|plans|artifacts|metrics|reports|releases)(/|$)|requirements.*\.lock$|\$\{|telemetry_loop$', d)] # the catalog reads the source itself
        if not inputs: found.append(f'{stage} has no input')
        loads = {n.args[1].value for n in ast.walk(trees[name]) if isinstance(n, ast.Call) and getattr(n.func, 'id', getattr(n.func, 'attr', '')) == 'load_params'
                 and len(n.args) > 1 and isinstance(n.args[1], ast.Constant)}
        need = loads | ({'run', stage} if stage in sections else set())
        listed = {p.split('.')[0] for p in body.get('params', []) if isinstance(p, str)}
        found += [f'{stage} lacks params: {p}' for p in sorted(need - listed)] + [f'{stage} lists params: {p}, which params.yaml has not' for p in sorted(listed - set(sections))]
    return found

def params_are_config_fields(root):
    found, trees = [], modules(root)
    classes = {c.name: c for t in trees.values() for c in t.body if isinstance(c, ast.ClassDef)}
    sections = yaml.safe_load((root/'params.yaml').read_text())
    def compare(where, values, cls):
        fields = {n.target.id: n for n in cls.body if isinstance(n, ast.AnnAssign)}
        found.extend(f'{where} has the key {k!r}, which {cls.name} has not' for k in values if k not in fields)
        found.extend(f'{where} lacks the key {k!r} of {cls.name}' for k in fields if k not in values)
        found.extend(f'{cls.name}.{k} has a default; values live in params.yaml' for k, n in fields.items() if n.value is not None and cls.name.endswith('Config'))
        for k, v in values.items():
            inner = [n.id for n in ast.walk(fields[k].annotation) if isinstance(n, ast.Name) and n.id in classes] if k in fields else []
            if inner: # a nested record, or a list or table of them
                outer = getattr(getattr(fields[k].annotation, 'value', None), 'id', None)
                for i, each in ([('', v)] if outer is None else v.items() if isinstance(v, dict) else enumerate(v or [])): compare(f'{where}.{k}{i and f".{i}"}', each, classes[inner[0]])
    for section, values in sections.items():
        name = 'config' if section == 'run' else section
        if name not in trees: found.append(f'params.yaml has the section {section!r}, which has no module'); continue
        used = {a.name for n in trees[name].body if isinstance(n, ast.ImportFrom) for a in n.names} # a stage may take its values' names from a lower chapter
        own = [c for n, c in classes.items() if n.lower() == f'{section.replace("_", "")}config' and (c in trees[name].body or n in used)]
        if not own: found.append(f'{name}.py has no class {section.title()}Config for the section {section!r}'); continue
        compare(section, values or {}, own[0])
    for name, t in trees.items():
        for c in t.body:
            if isinstance(c, ast.ClassDef) and c.name.lower() == f'{name}config' and name not in sections: found.append(f'{c.name} has no section {name!r} in params.yaml')
    return found

def reports_only_show(root):
    found = []
    for path in sorted((root/'reports').glob('*.ipynb')):
        code = [c for c in cells(path) if is_code(c)]
        tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
        if len(tagged) != 1: found.append(f'{path.name} has {len(tagged)} cells tagged parameters; it must have one')
        for c in tagged:
            found += [f'{path.name} has an untyped parameter: {ast.unparse(n)}' for n in tree(c['source']).body if not isinstance(n, ast.AnnAssign)]
        for c in code:
            found += [f'{path.name} defines {n.name}; reports compute nothing new' for n in ast.walk(tree(c['source'])) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        if not any('Caveats' in c['source'] for c in cells(path)): found.append(f'{path.name} has no Caveats section')
    return found

def no_conflict_markers(root):
    found = []
    for path in sorted([*(root/'nbs').glob('*.ipynb'), *(root/'reports').glob('*.ipynb')]):
        try: found += [f'{path.name} holds a conflict marker in cell {i}' for i, c in enumerate(cells(path)) if re.search(r'^`?(<{7}|>{7})( |`|$)', c['source'], re.M)]
        except json.JSONDecodeError: found.append(f'{path.name} is not a notebook; an unsettled merge?')
    return found

def chapters_teach(root):
    found = []
    for name, (_, path) in chapters(root).items():
        all_cells = cells(path)
        opening = re.match(r'# \S.*\n\s*>\s*(\S.*)', all_cells[0]['source'] if all_cells else '')
        if not opening: found.append(f'{path.name} does not open with a title and a promise'); continue
        if not any(f'default_exp {name}' in c['source'] for c in all_cells): found.append(f'{path.name} does not export to {name}')
        module = root/PACKAGE/f'{name}.py'
        if not module.exists() or (ast.get_docstring(ast.parse(module.read_text(encoding='utf-8'))) or '').strip() != opening[1].strip(): found.append(f'the promise of {path.name} is not the docstring of {name}.py')
        shown = [c for c in all_cells if is_code(c) and not {'export', 'exporti', 'exports', 'hide', 'default_exp'} & set(directives(c))]
        if not any(c.get('outputs') or re.search(r'^\s*(test_\w+\(|assert |with expect_fail)', c['source'], re.M) for c in shown): found.append(f'{path.name} demonstrates nothing')
    return found

def _nbdev(root, *command):
    done = subprocess.run([BIN/command[0], *command[1:]], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]

def _copy(root, to):
    for name in ('nbs', PACKAGE, 'reports', 'dvc.yaml', 'params.yaml', 'settings.ini', 'pyproject.toml', 'setup.py', 'README.md'):
        if (root/name).is_dir(): shutil.copytree(root/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        elif (root/name).exists(): shutil.copy(root/name, to/name)
    return to

def _differ(root, other, pattern): # files that are not byte for byte the same on both sides
    names = {p.relative_to(r) for r in (root, other) for p in r.glob(pattern)}
    return sorted(str(n) for n in names if not ((root/n).exists() and (other/n).exists() and (root/n).read_bytes() == (other/n).read_bytes()))

def export_is_in_sync(root, scratch):
    copy = _copy(root, scratch); _nbdev(copy, 'nbdev_export')
    return [f'{n} is not what its chapter exports; run nbdev_export (or nbdev_update)' for n in _differ(root, copy, f'{PACKAGE}/*.py') + _differ(root, copy, 'pyproject.toml')]

def clean_changes_nothing(root, scratch):
    copy = _copy(root, scratch); _nbdev(copy, 'nbdev_clean')
    if (copy/'reports').is_dir(): _nbdev(copy, 'nbdev_clean', '--fname', 'reports')
    return [f'{n} is not clean; run nbdev_clean' for folder in ('nbs', 'reports') for n in _differ(root, copy, f'{folder}/*.ipynb')]

# ---------------------------------------------------------------- the house keeps them
PLAIN = [imports_point_down, stage_deps_are_closures, params_are_config_fields, reports_only_show, no_conflict_markers, chapters_teach]

@pytest.mark.parametrize('rule', PLAIN, ids=lambda r: r.__name__)
def test_kept(rule): assert rule(ROOT) == []

@pytest.mark.parametrize('rule', [export_is_in_sync, clean_changes_nothing], ids=lambda r: r.__name__)
def test_kept_by_tools(rule, tmp_path): assert rule(ROOT, tmp_path) == []

# ---------------------------------------------------------------- and each one bites
@pytest.fixture
def house(tmp_path):
    (tmp_path/'house').mkdir()
    return _copy(ROOT, tmp_path/'house')

def edit(path, change): # change: cells -> None, in place
    book = json.loads(path.read_text(encoding='utf-8')); change(book['cells'])
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def code(source, tags=()): return dict(cell_type='code', execution_count=None, id='abcd1234', metadata={'tags': list(tags)} if tags else {}, outputs=[], source=source)

def says(complaints, *words): assert any(all(w in c for w in words) for c in complaints), complaints

def test_upward_import_is_seen(house):
    with open(house/PACKAGE/'config.py', 'a') as f: f.write('\ndef later():\n    from .schema import columns\n')
    says(imports_point_down(house), 'config.py', 'schema')

def test_upward_import_in_a_demonstration_is_seen(house):
    edit(house/'nbs/00_config.ipynb', lambda c: c.append(code('from telemetry_loop.schema import columns')))
    says(imports_point_down(house), '00_config.ipynb', 'schema')

def test_module_without_chapter_is_seen(house):
    (house/PACKAGE/'helpers.py').write_text('x = 1\n')
    says(imports_point_down(house), 'helpers.py', 'no chapter')

@pytest.fixture
def piped(house): # a house with a pipeline of one stage, whatever the real one is
    (house/PACKAGE/'sessions.py').write_text('from .config import load_params\nfrom .schema import columns\ndef run(): load_params(None, "run"); load_params(None, "sessions")\n')
    params = yaml.safe_load((house/'params.yaml').read_text()); params['sessions'] = {'gap': 1}
    (house/'params.yaml').write_text(yaml.safe_dump(params))
    def write(deps=('telemetry_loop/config.py', 'telemetry_loop/schema.py', 'telemetry_loop/sessions.py', 'artifacts/ingest'), params=('run', 'sessions'), cmd='telemetry-loop sessions'):
        (house/'dvc.yaml').write_text(yaml.safe_dump({'stages': {'sessions': {'cmd': cmd, 'deps': list(deps), 'params': list(params), 'outs': ['artifacts/sessions']}}}))
        return stage_deps_are_closures(house)
    return write

def test_stage_rule(piped):
    assert piped() == []
    says(piped(deps=('telemetry_loop/config.py', 'telemetry_loop/sessions.py', 'artifacts/ingest')), 'lacks', 'schema.py')
    says(piped(deps=('telemetry_loop/config.py', 'telemetry_loop/schema.py', 'telemetry_loop/sessions.py', 'telemetry_loop/estimate.py', 'artifacts/ingest')), 'estimate.py', 'does not import')
    says(piped(deps=('telemetry_loop/config.py', 'telemetry_loop/schema.py', 'telemetry_loop/sessions.py', 'tmp/x')), 'tmp/x')
    says(piped(params=('run',)), 'lacks params: sessions')
    says(piped(params=('run', 'sessions', 'none')), 'none')
    says(piped(cmd='python x.py'), 'verb')
    says(piped(cmd='telemetry-loop nowhere'), 'nowhere')

def test_stage_rule_on_the_real_pipeline(house):
    text = (house/'dvc.yaml').read_text()
    dropped = re.sub(r'telemetry_loop/config\.py,? ?', '', text, count=1)
    assert dropped != text
    (house/'dvc.yaml').write_text(re.sub(r'^\s*- $\n', '', dropped, flags=re.M))
    says(stage_deps_are_closures(house), 'lacks', 'config.py')

def test_params_rule(house):
    path = house/'params.yaml'; good = yaml.safe_load(path.read_text())
    def broken(**change): path.write_text(yaml.safe_dump(good | change)); return params_are_config_fields(house)
    says(broken(run=good['run'] | {'extra': 1}), 'run', 'extra')
    says(broken(run={k: v for k, v in good['run'].items() if k != 'seed'}), 'lacks', 'seed')
    says(broken(cellar={'x': 1}), 'cellar', 'no module')
    path.write_text(yaml.safe_dump(good))
    with open(house/PACKAGE/'schema.py', 'a') as f: f.write('\nclass SchemaConfig:\n    depth: int = 3\n')
    says(params_are_config_fields(house), 'SchemaConfig', 'no section')
    says(broken(schema={'depth': 3}), 'SchemaConfig.depth', 'default')

def test_report_rule(house):
    (house/'reports').mkdir(exist_ok=True)
    def broken(*made):
        (house/'reports/99_new.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='markdown', metadata={}, source='## Caveats'), *made], metadata={}, nbformat=4, nbformat_minor=5)))
        return [c for c in reports_only_show(house) if '99_new' in c]
    one = code('k: int = 1 # how many', ['parameters'])
    assert broken(one) == []
    says(broken(), '0 cells'); says(broken(one, one), '2 cells')
    says(broken(one, code('def f(): pass')), 'defines f'); says(broken(one, code('class A: pass')), 'defines A')
    says(broken(code('k = 1', ['parameters'])), 'untyped')

def test_conflict_rule(house):
    edit(house/'nbs/00_config.ipynb', lambda c: c.insert(3, dict(cell_type='markdown', id='aaaa1111', metadata={}, source='`<<<<<<< HEAD`')))
    says(no_conflict_markers(house), '00_config.ipynb')
    (house/'nbs/01_schema.ipynb').write_text('<<<<<<< HEAD\n{}')
    says(no_conflict_markers(house), '01_schema.ipynb')

@pytest.mark.parametrize('change,word', [
    (lambda c: c.__setitem__(0, dict(c[0], source='# Config')), 'promise'),
    (lambda c: c.__setitem__(0, dict(c[0], source='# Config\n\n> Another promise.')), 'docstring'),
    (lambda c: c.__setitem__(slice(None), [x for x in c if x['cell_type'] == 'markdown' or '#|' in ''.join(x['source'])]), 'demonstrates'),
], ids=['no promise', 'another promise', 'no demonstration'])
def test_chapter_rule(house, change, word):
    edit(house/'nbs/00_config.ipynb', change)
    says(chapters_teach(house), '00_config', word)

def test_export_rule(house, tmp_path):
    with open(house/PACKAGE/'config.py', 'a') as f: f.write('\nedited_by_hand = 1\n')
    (tmp_path/'scratch').mkdir()
    says(export_is_in_sync(house, tmp_path/'scratch'), 'config.py')

def test_clean_rule(house, tmp_path):
    edit(house/'nbs/00_config.ipynb', lambda c: next(x for x in c if x['cell_type'] == 'code').update(execution_count=7))
    (tmp_path/'scratch').mkdir()
    says(clean_changes_nothing(house, tmp_path/'scratch'), '00_config.ipynb')
