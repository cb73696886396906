"""What the server of conftest.py does once, before it forks itself for every script that a test starts."""

import tempfile
import threading

import conftest  # noqa: F401
import datasets.packaged_modules.json.json  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import torch
import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, logging

import dpo  # noqa: F401
import p3o  # noqa: F401
import ppo  # noqa: F401
import reward_model  # noqa: F401
import sft  # noqa: F401

tqdm.tqdm.set_lock(threading.RLock())  # its own lock would outlive a process that is killed, and be reported

# The first model that transformers loads, and its first sample, take much longer than the second.
ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
config = GPT2Config(vocab_size=4, n_positions=8, n_embd=4, n_layer=1, n_head=1, num_labels=1, **ids)
verbosity = logging.get_verbosity()
logging.set_verbosity_error()
logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
model.generate(torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=2)
logging.enable_progress_bar()
logging.set_verbosity(verbosity)
