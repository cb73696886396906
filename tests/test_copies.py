"""The scripts as texts: copies are true copies, importing does nothing, nothing dangerous is called, and they are
as long as the design allows: tests of what a reader, and not only a machine, finds in them."""

import ast
import difflib
import re

import pytest
from conftest import ROOT, run_script

LINES = {  # at most, formatted, blank lines included: none may grow; toy.py as it is
    "p3o": 573,
    "sft": 409,
    "reward_model": 459,
    "dpo": 587,
    "ppo": 772,
    "evaluate": 440,
    "frontier": 380,
    "judge": 240,
    "data": 280,
}
FUNCTION_LINES, MAIN_LINES, NESTING, LINE_LENGTH = 60, 100, 3, 110
ORDER = "the mathematics", "tokens", "data and models", "rollout|evaluation", "the run folder", "main"

SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
TRAINING = ("sft", "reward_model", "p3o", "ppo", "dpo")
OWN = {"Args", "main"}  # every script has its own
EACH = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names_of(node):
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [
        name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def definitions(path):
    """{name: source text} of top-level functions, classes and constants, with their comments and decorators.

    Several statements on one name (A = ...; A += ...) make one text, as they belong together.
    """
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(keepends=True), {}
    for node in parse(path).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "".join(lines[first - 1 : node.end_lineno])
        for name in names_of(node):
            found[name] = found.get(name, "") + source
    return found


def calls(path):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


# ----------------------------------------------------------------------------------------------------- copies
def test_definitions_of_one_name_are_identical():
    first, wrong = {}, []
    for path in SCRIPTS:
        for name, source in definitions(path).items():
            if name in OWN:
                continue
            origin, text = first.setdefault(name, (path.name, source))
            if text != source:
                lines = (part.splitlines(keepends=True) for part in (text, source))
                wrong += difflib.unified_diff(*lines, f"{origin}: {name}", f"{path.name}: {name}")
    assert not wrong, "two definitions of one name differ; copy one over the other, or rename it\n" + "".join(
        wrong
    )


def test_copies_are_really_compared():
    """The check above sees the helpers that are known to be shared, whole."""
    texts = [definitions(ROOT / f"{name}.py") for name in TRAINING]
    for name in ("pad", "load_model", "MAY_CHANGE", "explained", "open_run", "end_step", "guard"):
        copies = {text[name] for text in texts}
        assert len(copies) == 1 and len(copies.pop()) > 80
    p3o = definitions(ROOT / "p3o.py")
    assert p3o["Args"].startswith("@dataclass") and p3o["explained"].startswith("@contextmanager")


def test_the_failure_block_is_the_same_text():
    """One heading, and between it and main the same bytes, comments and order included, in every script."""
    blocks = set()
    for name in TRAINING:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        start = text.index("the run folder and failures")
        blocks.add(text[start : text.index("\n# ------", start)])
    assert len(blocks) == 1 and len(blocks.pop()) > 3000


# ---------------------------------------------------------------------------------------------------- imports
def test_no_script_imports_another():
    """Except that evaluate.py may know the toy's gold reward."""
    for path in SCRIPTS:
        for node in ast.walk(parse(path)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in imported:
                allowed = (path.stem, name) == ("evaluate", "toy")
                assert (name or "").split(".")[0] not in NAMES or allowed, f"{path.name} imports {name}"
        text = path.read_text(encoding="utf-8")
        assert "import_module" not in text and "__import__" not in text, path.name


PROBE = """
import signal, socket, sys
import torch, transformers, datasets, matplotlib
for name in {names}: sys.modules.pop(name, None)
sys.argv = ["x", "--not-an-argument"]
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
state, threads = torch.get_rng_state(), torch.get_num_threads()
verbosity = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
for name in {names}: __import__(name)
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert verbosity == (transformers.logging.get_verbosity(), datasets.logging.get_verbosity())
assert not torch.cuda.is_initialized() and torch.get_default_dtype() == torch.float32
"""


def test_importing_does_nothing(tmp_path):
    """No parsing, no files, no output, no network, no device, no signal handler, no seed."""
    (tmp_path / "probe.py").write_text(PROBE.format(names=NAMES))
    (tmp_path / "work").mkdir()
    done = run_script(tmp_path / "probe.py", cwd=tmp_path / "work")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert not list((tmp_path / "work").iterdir())


@EACH
def test_only_definitions_at_top_level(path):
    """Docstring, imports, definitions, and one guarded last statement; and how threads wait, which torch reads
    when it is imported."""
    *body, last = parse(path).body
    assert ast.unparse(last).startswith("if __name__ == '__main__':")
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    functions = ast.FunctionDef | ast.ClassDef
    for node in body[1:]:
        allowed = isinstance(node, functions | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign)
        allowed |= ast.unparse(node) == "os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')"
        assert allowed, f"{path.name}:{node.lineno} does something"


# ----------------------------------------------------------------------------------------------------- safety
FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load"}
FORBIDDEN |= {"marshal.loads", "yaml.load", "numpy.load", "np.load", "torch.jit.load", "torch.hub.load"}


@EACH
def test_nothing_dangerous(path):
    """No pickle from disk, no remote code, no shell, no code made of text."""
    loads = 0
    for name, call in calls(path):
        assert name not in FORBIDDEN, f"{path.name}:{call.lineno} calls {name}"
        given = keywords(call)
        assert given.get("shell", "False") == "False", f"{path.name}:{call.lineno} uses a shell"
        if name == "torch.load":
            loads += 1
            assert given.get("weights_only") == "True", f"{path.name}:{call.lineno} may run a pickle"
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output"):
            words = isinstance(call.args[0], ast.List | ast.Name)
            assert words, f"{path.name}:{call.lineno}: give a list of words, not a command line"
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code" not in text and "import pickle" not in text
    assert loads or "torch.load" not in text, "a torch.load that is not called by this name"


# ---------------------------------------------------------------------------------------------------- lengths
BLOCKS = ast.For | ast.While | ast.If | ast.With | ast.Try


def functions(path):
    """Every function of a file, methods and functions inside functions included."""
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How many compound statements stand inside each other in a node; elif is not inside its if."""
    nested = [depth(child) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.If) and [type(child) for child in node.orelse] == [ast.If]:
        nested[-1] -= 1
    return max(nested, default=0) + isinstance(node, BLOCKS)


def loops(node):
    """How many loops one comprehension has, those of comprehensions in its elements included."""
    generators = getattr(node, "generators", [])
    inside = [loops(child) for child in ast.iter_child_nodes(node) if child not in generators]
    return max([len(generators) + max(inside, default=0), *map(loops, generators)])


@pytest.mark.parametrize("name", LINES)
def test_a_script_is_short(name):
    if not (ROOT / f"{name}.py").exists():
        pytest.skip("not written yet")
    lines = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= LINES[name], f"{name}.py has {lines} lines; leave something out, press nothing together"


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem in LINES], ids=lambda path: path.stem)
def test_functions_are_short(path):
    for node in functions(path):
        lines, most = node.end_lineno - node.lineno + 1, MAIN_LINES if node.name == "main" else FUNCTION_LINES
        assert lines <= most, f"{path.name}: {node.name} has {lines} lines, not {most}"
        assert depth(node) <= NESTING, f"{path.name}: {node.name} nests {depth(node)} deep, not {NESTING}"
        assert loops(node) <= 2, f"{path.name}: a triple comprehension in {node.name}"


def test_nesting_is_counted():
    def nests(text):
        return depth(ast.parse(text))

    assert nests("def f():\n  for x in y:\n    if x:\n      with x:\n        pass\n  for x in y: pass") == 3
    assert nests("if x: pass\nelif y: pass\nelif z: pass\nelse: pass") == 1
    assert nests("if x: pass\nelse:\n  if y: pass\n  z()") == 2
    assert nests("if x:\n  if y: pass\nelif z: pass") == 2
    assert loops(ast.parse("[[x for x in y] for y in [a for b in c for a in b] if any(a for a in y)]")) == 2
    assert loops(ast.parse("[x for y in z for x in y for a in x]")) == 3
    assert loops(ast.parse("{x: [[a for a in y] for y in z] for x in z}")) == 3


@pytest.mark.parametrize("name", TRAINING)
def test_the_order_is_the_same_in_every_script(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    headings = re.findall("^# -+ (.*)", text, re.M)
    assert len(headings) == len(ORDER)
    for heading, expected in zip(headings, ORDER):
        assert re.search(expected, heading), f"{heading} stands where {expected} should"


# ------------------------------------------------------------------------------------------------------ style
@EACH
def test_docstrings_and_lines(path):
    """A docstring for every public function and class of some length; lines that fit; plain text files."""
    tree, text = parse(path), path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            short = len(node.body) <= 3 or node.name in OWN
            assert ast.get_docstring(node) or short, f"{path.name}: {node.name} has no docstring"
    for number, line in enumerate(text.split("\n"), 1):
        assert len(line) <= LINE_LENGTH, f"{path.name}:{number} has {len(line)} characters"
        assert line == line.rstrip() and "\t" not in line, f"{path.name}:{number} has stray white space"
    assert text.endswith("\n") and not text.endswith("\n\n") and "\r" not in text
