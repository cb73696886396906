"""The scripts as texts: copies are true copies, importing does nothing, and nothing dangerous is called."""

import ast
import difflib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
OWN = {"Args", "main"}  # every script has its own
RUNNABLE = [path for path in SCRIPTS if "\ndef main(" in path.read_text(encoding="utf-8")]
LINE_LENGTH = 110


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


def python(code, cwd):
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(cwd),
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


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
    texts = [definitions(ROOT / name) for name in ("p3o.py", "reward_model.py", "sft.py")]
    for name in ("pad", "read_examples", "FORMATS", "ZERO_ALLOWED", "RunError", "save_checkpoint", "guard"):
        copies = {text[name] for text in texts}
        assert len(copies) == 1 and len(copies.pop()) > 80
    assert definitions(ROOT / "p3o.py")["Args"].startswith("@dataclass")
    assert "@torch.no_grad()" in definitions(ROOT / "p3o.py")["rollout"]


def test_the_failure_block_is_the_same_text():
    """One heading, and between it and main the same bytes, comments and order included, in every script."""
    blocks = {}
    for path in RUNNABLE:
        text = path.read_text(encoding="utf-8")
        if "checkpoints and failures" in text:
            start = text.index("checkpoints and failures")
            blocks[path.name] = text[start : text.index("\n# ------", start)]
    assert {"p3o.py", "reward_model.py", "sft.py"} <= set(blocks)
    assert len(set(blocks.values())) == 1, f"the block differs between {list(blocks)}"


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


def test_importing_does_nothing(tmp_path):
    """No parsing, no files, no output, no network, no device, no signal handler, no seed."""
    code = f"""
import signal, socket, sys
import torch, transformers, datasets, matplotlib
sys.argv = ["x", "--not-an-argument"]
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
state, threads = torch.get_rng_state(), torch.get_num_threads()
verbosity = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
for name in {NAMES!r}: __import__(name)
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert verbosity == (transformers.logging.get_verbosity(), datasets.logging.get_verbosity())
assert not torch.cuda.is_initialized() and torch.get_default_dtype() == torch.float32
"""
    work = tmp_path / "work"
    work.mkdir()
    done = python(code, work)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == ""
    left = [path for path in work.rglob("*") if not set(path.parts) & {".config", ".cache"}]  # of matplotlib
    assert not left


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_only_definitions_at_top_level(path):
    """Docstring, imports, definitions, and one guarded last statement."""
    *body, last = parse(path).body
    assert ast.unparse(last).startswith("if __name__ == '__main__':")
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    allowed = (
        ast.Import
        | ast.ImportFrom
        | ast.FunctionDef
        | ast.ClassDef
        | ast.Assign
        | ast.AugAssign
        | ast.AnnAssign
    )
    for node in body[1:]:
        adds = re.fullmatch(r"[A-Z_]+\.extend\(\[.*\]\)", ast.unparse(node))  # to a shared constant
        assert isinstance(node, allowed) or adds, f"{path.name}:{node.lineno} does something"


# ----------------------------------------------------------------------------------------------------- safety
FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load"}
FORBIDDEN |= {"marshal.loads", "yaml.load", "numpy.load", "np.load", "torch.jit.load", "torch.hub.load"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
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


# ------------------------------------------------------------------------------------------------------ style
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_docstrings_and_lines(path):
    """A docstring for every public function and class of some length; lines that fit; plain text files."""
    tree, text = parse(path), path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = len(node.body) <= 3 or node.name in OWN
            assert ast.get_docstring(node) or short, f"{path.name}: {node.name} has no docstring"
    for number, line in enumerate(text.split("\n"), 1):
        assert len(line) <= LINE_LENGTH, f"{path.name}:{number} has {len(line)} characters"
        assert line == line.rstrip() and "\t" not in line, f"{path.name}:{number} has stray white space"
    assert text.endswith("\n") and not text.endswith("\n\n") and "\r" not in text


def test_the_mathematics_is_documented():
    """The functions whose signatures are promised name their source."""
    promised = {
        "sft": ["completion_loss"],
        "reward_model": ["bradley_terry_loss"],
        "p3o": ["trajectory_reward", "pairwise_policy_gradient_loss", "p3o_loss", "response_logps"],
        "ppo": ["token_rewards", "gae", "masked_mean", "masked_whiten", "ppo_clip_loss", "ppo_penalty_loss"],
        "dpo": ["dpo_loss"],
        "evaluate": ["gibbs_frontier", "best_of_n_kl", "win_rate"],
    }
    for script, functions in promised.items():
        if script not in NAMES:
            continue
        tree = {
            node.name: node for node in parse(ROOT / f"{script}.py").body if isinstance(node, ast.FunctionDef)
        }
        for name in functions:
            assert name in tree, f"{script}.py promises {name}"
            assert len(ast.get_docstring(tree[name]) or "") > 30, f"{script}.{name} needs a docstring"
