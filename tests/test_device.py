"""A forgotten .to(device) fails here, on a machine without a GPU: the main of each script runs on the device "meta".

Its tensors have a shape and no contents. So main neither samples nor saves here, and each number that it reads is 1.
"""

import contextlib
import dataclasses
import importlib

import pytest
import torch
import torch.fx.experimental._config as meta_config
import transformers
from conftest import save_tiny_models, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RUNS = {
    "sft": ("sft", {}),
    "reward_model": ("reward_model", {"lm_coef": 0.1}),
    "p3o-v2": ("p3o", {"num_responses": 3}),
    "p3o-v1": ("p3o", {"clipping": "separate", "max_importance_weight": 2.0}),
    "p3o-none": ("p3o", {"clipping": "none"}),
    "ppo": ("ppo", {}),
    "ppo-max": (
        "ppo",
        {"normalize_reward": True, "advantage_clip": 1.0, "ptx_coef": 0.1},
    ),
    "ppo-penalty": ("ppo", {"policy_loss": "penalty", "critic_init": "sft", "kl_target": 1.0}),
    "dpo": ("dpo", {}),
    "dpo-online": ("dpo", {"online": True, "labels": "sampled"}),
}


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix devices, as a GPU does. Indices and single numbers may come from the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        may_mix = operation in (torch.ops.aten.index.Tensor, torch.ops.aten.copy_.default)
        assert may_mix or len({tensor.device for tensor in tensors}) < 2, f"{operation} mixes devices"
        return operation(*args, **(kwargs or {}))


def generate(policy, input_ids, **others):
    """In the place of sampling: two tokens more for each prompt."""
    return torch.cat([input_ids, input_ids[:, :1], input_ids[:, :1]], 1)


def read_ones(read):
    """In the place of Tensor.item and the like, which cannot read a meta tensor."""

    def read_tensor(tensor):
        return read(torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor)

    return read_tensor


@pytest.mark.parametrize("name", RUNS)
def test_main_keeps_its_tensors_on_one_device(name, tmp_path, monkeypatch):
    script, options = importlib.import_module(RUNS[name][0]), RUNS[name][1]
    save_tiny_models(tmp_path)
    columns = "prompt", "completion", "chosen", "rejected"
    data = write_rows(tmp_path / "data", columns=columns, rejected="longer")
    for read in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, read, read_ones(getattr(torch.Tensor, read)))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **options: torch.optim.SGD(groups, lr=1.0))
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "decode", lambda *args, **options: "text")
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *args: None)
    monkeypatch.setattr(script, "save", lambda *args, **more: None)
    given = {"model": tmp_path / "lm", "reward_model": tmp_path / "rm", "dataset": data}
    given |= {"ptx_dataset": data, "output_dir": tmp_path / "run"}
    given = {name: str(path) for name, path in given.items()} | {"device": "meta", "steps": 1}
    given |= {"prompts_per_step": 4, "minibatch_size": 4, "micro_batch_size": 2, "eval_rows": 3}
    known = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: value for name, value in given.items() if name in known}, **options)
    args.prompt_length, args.response_length = 12, 8
    with meta_config.patch(meta_nonzero_assume_all_nonzero=True), OneDevice():  # the first: masks as indices
        script.main(args)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
