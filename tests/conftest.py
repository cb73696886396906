import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Read when torch and datasets are imported, and by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"  # on toy models threads cost more than they give
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait do not take the core from others
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare bits, on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
if "HF_DATASETS_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="datasets_")
    os.environ["HF_DATASETS_CACHE"] = _cache.name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# One server process imports torch and transformers, with preloaded.py, and forks itself for every script of a test.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preloaded"])


def pytest_sessionstart():
    """Starts the server, which imports while pytest still collects the tests."""
    with pytest.MonkeyPatch.context() as patch:  # it does not know our sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()


def child(script, argv, cwd, log):
    """Runs in the child: a script as from the command line, with its output in two files."""
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = [str(ROOT / script), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_script(script, *args, cwd, env=None):
    """Runs a script as a process; with env as a fresh one. Returns status and output, and checks neither."""
    argv = [str(arg) for arg in args]
    if env:
        command = [sys.executable, str(ROOT / script), *argv]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=child, args=(script, argv, str(cwd), f"{folder}/log"))
        process.start()
        process.join(300)
        assert process.exitcode is not None, f"{script} hangs"
        out, err = (Path(folder, f"log.{name}").read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([script, *argv], process.exitcode, out, err)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(reverse=False, chat_template=None, add_bos=False, **special):
    """A tokenizer of bytes, with the special tokens at the end. Reversed ids make a different tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys(special.values())))
    if chat_template:
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if add_bos:
        ids = [(bos := special["bos_token"], tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def word_tokenizer(size, eos=1, pad=1):
    """A tokenizer of the words w0, w1, ... except that two ids, or one for both, are <eos> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {i: f"w{i}" for i in range(size)} | {pad: "<pad>"} | {eos: "<eos>"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token=words[size - 1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[eos], pad_token=words[pad])


def write_rows(folder, splits=("train", "validation"), rows=8, columns=("prompt", "completion"), **changes):
    """A data set of short texts such as p0 and c0, unless `changes` has another text for a column."""
    folder.mkdir(parents=True)
    texts = [{name: f"{name[0]}{i}" for name in columns} | changes for i in range(rows)]
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def save_tiny_models(folder):
    """A policy in lm and a reward model in rm: random GPT-2 models of one layer, with a tokenizer of bytes."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat_template=CHATML, pad_token="<pad>", eos_token="</s>")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": len(tokenizer)}
    size |= {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    models = {"lm": GPT2LMHeadModel(GPT2Config(**size))}
    models["rm"] = GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1, initializer_range=0.3))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A working directory with data/toy, out/sft and out/reward_model after a few steps, of a few of toy.py's rows.

    Read only: default paths are relative, so run scripts in it with an --output_dir elsewhere.
    """
    import toy

    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "ROWS", toy.ROWS | {"sft": (1920, 64, 64), "preferences": (640, 64, 64)})
        toy.build(folder / "data/toy", 0)
    few = ["--steps", 40, "--learning_rate", 3e-3, "--minibatch_size", 16]
    for script, flags in {"sft.py": ["--steps", 60], "reward_model.py": few}.items():
        done = run_script(script, *flags, "--eval_rows", 64, cwd=folder)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return folder


QUICK = ["--num_responses", 4, "--prompts_per_step", 16, "--minibatch_size", 8, "--steps", 6, "--beta", 0.1]
QUICK += ["--learning_rate", 1e-3, "--eval_every", 100, "--eval_prompts", 64]


@pytest.fixture(scope="session")
def p3o_run(chain, tmp_path_factory):
    """The folder of a run of p3o.py with the flags QUICK, and what it printed. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "p3o"
    done = run_script("p3o.py", *QUICK, "--output_dir", folder, cwd=chain)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout
