import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # read when torch is imported; on toy models threads cost more than they give
)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
if "HF_DATASETS_CACHE" not in os.environ:  # also read by the processes that tests start
    _cache = tempfile.TemporaryDirectory(prefix="datasets_")
    os.environ["HF_DATASETS_CACHE"] = _cache.name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_script(script, *args, cwd, **kwargs):
    """One script as its own process; its output as text. Does not check the exit status."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(reverse=False, chat_template=None, add_bos=False, **special):
    """Any text in tokens of one byte; reversed ids make a different tokenizer. Special tokens come behind."""
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
        bos = special["bos_token"]
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A working directory with data/toy, and out/sft and out/reward_model after a few steps; read only.

    Default paths are relative: run scripts with it as working directory and an --output_dir of your own.
    """
    folder = tmp_path_factory.mktemp("chain")
    for script, *args in (
        ("toy.py",),
        ("sft.py", "--steps", 60, "--eval_rows", 64),
        ("reward_model.py", "--steps", 40, "--learning_rate", 3e-3, "--eval_rows", 64),
    ):
        done = run_script(script, *args, cwd=folder)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return folder
