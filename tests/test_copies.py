"""The scripts as texts: shared functions are true copies, nothing is imported across, importing a script does nothing,
nothing dangerous is called, and no script is longer than the design allows."""

import ast
import difflib

import pytest
from conftest import ROOT, run_script

# formatted, blank ones included
LINES = {"p3o": 460, "sft": 330, "reward_model": 370, "dpo": 480, "ppo": 630}
LINES |= {"evaluate": 390, "frontier": 380, "judge": 240, "data": 290, "curves": 70}
SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
THEIR_OWN = "Args", "train_step", "main"  # what every script has in its own way
EACH = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def definitions(path):
    """{name: source text} of top-level functions, classes and constants, with their decorators and comments."""
    lines, found = path.read_text(encoding="utf-8").splitlines(keepends=True), {}
    for node in parse(path).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]
        for name in [node.name] if hasattr(node, "name") else names:
            found[name] = found.get(name, "") + "".join(lines[first - 1 : node.end_lineno])
    return found


def test_definitions_of_one_name_are_identical():
    """In all scripts, except for what is THEIR_OWN."""
    first, wrong = {}, []
    for path in SCRIPTS:
        for name, source in definitions(path).items():
            origin, text = first.setdefault(name, (path.name, source))
            if text != source and name not in THEIR_OWN:
                lines = (part.splitlines(keepends=True) for part in (text, source))
                wrong += difflib.unified_diff(*lines, f"{origin}: {name}", f"{path.name}: {name}")
    assert not wrong, "copy one over the other, or rename it\n" + "".join(wrong[:60])


def test_copies_are_really_compared():
    """The check above sees the functions that are known to be shared, with their decorators."""
    trainers = [definitions(ROOT / f"{script}.py") for script in ("sft", "reward_model", "p3o", "ppo", "dpo")]
    for name in ("model_inputs", "load_model", "data_order", "check_args", "open_run", "save"):
        copies = [found[name] for found in trainers]
        assert len(set(copies)) == 1 and len(copies[0]) > 200, name
    assert trainers[2]["Args"].startswith("@dataclass")
    assert trainers[2]["score_batch"].startswith("@torch.no_grad")


def test_no_script_imports_another():
    """Except that evaluate.py may know the toy's gold reward."""
    for path in SCRIPTS:
        for node in ast.walk(parse(path)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            across = {name.split(".")[0] for name in imported} & set(NAMES)
            assert across <= ({"toy"} if path.stem == "evaluate" else set()), f"{path.name} imports {across}"
        text = path.read_text(encoding="utf-8")
        assert "import_module" not in text and "__import__" not in text, path.name


PROBE = """
import signal, socket, sys
import torch, transformers, datasets, matplotlib
for name in {names}: sys.modules.pop(name, None)
sys.argv = ["script.py", "--not-an-argument"]
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    verbosity = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    return [handlers, verbosity, torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()]
before = state()
for name in {names}: __import__(name)
assert state() == before and not torch.cuda.is_initialized()
"""


def test_importing_does_nothing(tmp_path):
    """No parsing, no files, no output, no network, no device, no signal handler, no seed."""
    (tmp_path / "probe.py").write_text(PROBE.format(names=NAMES))
    (tmp_path / "work").mkdir()
    done = run_script(tmp_path / "probe.py", cwd=tmp_path / "work")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert not list((tmp_path / "work").iterdir())


FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load"}
FORBIDDEN |= {"marshal.loads", "yaml.load", "numpy.load", "np.load", "torch.jit.load", "torch.hub.load"}


@EACH
def test_nothing_dangerous(path):
    """No pickle from disk, no remote code, no shell, no code made of text."""
    loads, text = 0, path.read_text(encoding="utf-8")
    for call in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in FORBIDDEN, f"{path.name}:{call.lineno} calls {name}"
        assert given.get("shell", "False") == "False", f"{path.name}:{call.lineno} uses a shell"
        if name == "torch.load":
            loads += 1
            assert given.get("weights_only") == "True", f"{path.name}:{call.lineno} may run a pickle"
    assert "trust_remote_code" not in text and "import pickle" not in text
    assert loads == text.count("torch.load"), "a torch.load that is not called by this name"


def test_a_script_is_short():
    for name, limit in LINES.items():
        lines = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
        assert lines <= 1.05 * limit, f"{name}.py has {lines} lines; leave something out"
