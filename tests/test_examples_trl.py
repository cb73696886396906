"""The example in TRL: its updates are p3o.py's, in one process and in two; pairs stay together.

This file is also the script of the processes that the tests start: the example, with fixed responses.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, byte_tokenizer, run_script
from safetensors.torch import load_file

pytest.importorskip("trl", reason="needs pip install -r examples/requirements.txt")
pytest.importorskip("peft", reason="needs pip install -r examples/requirements.txt")

import trl.trainer.rloo_trainer as rloo
from transformers import AutoModelForCausalLM

import dpo
import p3o

spec = importlib.util.spec_from_file_location("p3o_with_trl", ROOT / "examples/p3o_with_trl.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

RATE, R, SETTINGS = 0.0005, 8, [("joint", 2, 1.0), ("separate", 4, 0.7), ("none", 3, 1.0)]
FLAGS = ["--use_cpu", "--max_completion_length", R, "--eval_prompts", 8, "--per_device_eval_batch_size", 12]
# Plain gradient descent: what a step takes off the weights is the gradient. Two steps on one rollout of 4
# prompts, each of two micro-batches: at the second step rho is not 1 any more, and the order does not matter.
STEPS = ["--optim", "sgd", "--learning_rate", RATE, "--lr_scheduler_type", "constant", "--max_grad_norm", 0]
STEPS += ["--max_steps", 2, "--num_iterations", 2, "--gradient_accumulation_steps", 2, "--seed", 3]


def fixed_response(prompt_ids, k):
    """Response k to a prompt, always the same: 1 to R tokens, most of them closed by EOS, which is 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((prompt_ids, k)).encode()))
    ids = torch.randint(3, 99, (int(torch.randint(1, R + 1, (), generator=generator)),), generator=generator)
    return ids.tolist() if len(ids) == R else [*ids.tolist(), 1]


def fixed_responses(seen):
    """In place of sampling. The prompts of the rollouts go to `seen`, those of evaluations do not."""

    def generate(self, prompt_ids, images, multimodal_fields):
        K = self.num_generations if self.model.training else self.num_generations_eval
        seen.extend([prompt_ids] * self.model.training)
        return [fixed_response(ids, row % K) for row, ids in enumerate(prompt_ids)]

    return generate


def run(chain, monkeypatch, folder, *words):
    """The example in this process."""
    monkeypatch.chdir(chain)
    return example.main([str(word) for word in (*FLAGS, *words, "--output_dir", folder)])


def launch(chain, folder, *words, options=()):
    """The example with fixed responses in two processes; what they printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0, *options]
    command += [__file__, *FLAGS, *words, "--output_dir", folder]
    done = subprocess.run([str(x) for x in command], cwd=chain, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def weights(folder):
    return load_file(folder / "model.safetensors")


def other_reference(model):  # so that there is a KL in the reward
    model.get_input_embeddings().weight.data *= 1.1


def update_by_p3o(rows, K, clipping, temperature):
    """p3o.py's updates on the fixed responses to these prompts."""
    settings = {"clipping": clipping, "temperature": temperature, "response_length": R, "device": "cpu"}
    args = p3o.Args(**settings, num_responses=K, micro_batch_size=4, max_grad_norm=1e9)
    tokenizer = p3o.load_tokenizer(args)
    policy, reference = (p3o.load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    other_reference(reference)
    responses = [fixed_response(ids, row % K) for row, ids in enumerate(rows)]
    batch = dpo.pad_rows(rows, responses, tokenizer, args) | {"response": responses, "prompt": rows}
    batch["ended"] = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in responses])
    assert 0 < batch["ended"].float().mean() < 1 and not batch["prompt_mask"].all()
    p3o.score_batch(batch, policy, reference, p3o.load_reward(tokenizer, args), args)
    score = batch["score"].view(-1, K)
    logp_old_seq, logp_ref_seq = (batch[x].sum(1).view(-1, K) for x in ("logp_old_tok", "logp_ref_tok"))
    reward = p3o.trajectory_reward(score, logp_old_seq, logp_ref_seq, args.beta)
    optimizer = torch.optim.SGD(policy.parameters(), RATE)
    for _ in range(2):
        p3o.update_policy(policy, optimizer, batch, reward, torch.arange(len(reward)), args)
    return policy.state_dict()


def assert_same_update(weights, expected, before):
    """Equal to rounding, of the weights and of the largest change; and there is a change."""
    for name, x in before.items():
        change, off = (expected[name] - x).abs().max(), (weights[name] - expected[name]).abs().max()
        assert off <= 1.2e-7 * x.abs().max() + 1e-5 * change, (name, off, change)
    assert max((expected[name] - x).abs().max() for name, x in before.items()) > 5e-4


def two_prompts(K, processes=1):
    """Micro-batches of two prompts over all processes; two of them to a rollout."""
    words = ["--num_generations", K, "--steps_per_generation", 2]
    return [*words, "--per_device_train_batch_size", 2 * K // processes]


@pytest.mark.parametrize("clipping, K, temperature", SETTINGS)
def test_updates_are_those_of_p3o(clipping, K, temperature, chain, tmp_path, monkeypatch):
    """So the leave-one-out advantages, the KL, positions and temperature are right, and pairs are pairs."""
    seen, start = [], example.P3OTrainer.train
    monkeypatch.setattr(example.P3OTrainer, "_generate_single_turn", fixed_responses(seen))
    train = lambda self: other_reference(self.ref_model) or start(self)  # noqa: E731
    monkeypatch.setattr(example.P3OTrainer, "train", train)
    words = [*STEPS, *two_prompts(K), "--clipping", clipping, "--temperature", temperature]
    run(chain, monkeypatch, tmp_path, *words, "--num_generations_eval", 2)
    rows = seen[0]
    assert len(rows) == 4 * K and rows[::K] == rows[K - 1 :: K]
    expected = update_by_p3o(rows, K, clipping, temperature)
    assert_same_update(weights(tmp_path), expected, weights(chain / "out/sft"))


@pytest.fixture(scope="module")
def one_process(chain, tmp_path_factory):
    """Weights after the two steps in one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.P3OTrainer, "_generate_single_turn", fixed_responses([]))
        run(chain, patch, folder, *STEPS, *two_prompts(4))
    return weights(folder)


FSDP = ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_transformer_layer_cls_to_wrap", "GPT2Block", "--fsdp_state_dict_type", "FULL_STATE_DICT"]


@pytest.mark.parametrize("options", [["--multi_gpu"], FSDP], ids=["ddp", "fsdp"])
def test_two_processes_make_the_update_of_one(options, one_process, chain, tmp_path):
    """On CPU, by gloo. Each takes half the prompts; the gradient is the same to rounding."""
    printed = launch(chain, tmp_path, *STEPS, *two_prompts(4, processes=2), options=options)
    assert printed.count("nats/response on held-out prompts") == 1
    assert printed.count("2 processes, FSDP" if options == FSDP else "2 processes, MULTI_CPU") == 2
    assert_same_update(weights(tmp_path), one_process, weights(chain / "out/sft"))


def test_a_split_pair_ends_the_run(chain, tmp_path, monkeypatch):
    """Rows shuffled one by one, as RLOOTrainer does it, before they are made groups."""
    original = rloo.RLOOTrainer._generate_and_score_completions
    shuffled = lambda self, inputs: rloo.shuffle_sequence_dict(original(self, inputs))  # noqa: E731
    monkeypatch.setattr(rloo.RLOOTrainer, "_generate_and_score_completions", shuffled)
    with pytest.raises(RuntimeError, match="the responses to a prompt were split"):
        run(chain, monkeypatch, tmp_path, *two_prompts(2))


def test_prompts_are_literal():
    tokenizer = byte_tokenizer(add_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    trainer = SimpleNamespace(processing_class=tokenizer)
    ids, images, fields = example.P3OTrainer._tokenize_prompts(trainer, ["ab"])
    assert len(tokenizer("ab")["input_ids"]) == 3 and len(ids[0]) == 2 and (images, fields) == (None, {})


def test_lora_trains_the_adapters_alone(chain, tmp_path, monkeypatch):
    words = ["--use_peft", "--lora_r", 4, "--max_steps", 4, "--learning_rate", 0.01]
    trainer = run(chain, monkeypatch, tmp_path, *words, *two_prompts(2))
    before, trained = weights(chain / "out/sft"), 0
    for name, x in trainer.model.named_parameters():
        assert x.requires_grad == ("lora_" in name)
        trained += x.numel() * x.requires_grad
        if not x.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(x, before[name]), name
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(x.numel() for x in saved.values()) == trained > 0
    assert any(x.abs().max() > 0 for name, x in saved.items() if "lora_B" in name)
    assert not (tmp_path / "model.safetensors").exists()


def test_what_it_refuses(chain, tmp_path, monkeypatch):
    rows = ["--per_device_train_batch_size", 4, "--steps_per_generation", 3]  # TRL itself would take K = 3
    divide, plain = "--num_generations must divide", "P3O takes rewards as they are"
    wrong = [["--num_generations", 3], ["--num_generations_eval", 5], ["--normalize_advantages"]]
    for words, message in zip(wrong, (divide, divide, plain)):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run(chain, monkeypatch, tmp_path / "no", *rows, *words)
    assert not (tmp_path / "no").exists()


def test_relatives_train_with_trl(chain, tmp_path):
    """examples/relatives_with_trl.py writes a run folder as p3o.py does, of a policy that moved."""
    words = "--method rloo --steps 1 --learning_rate 1e-3 --prompts_per_step 4 --minibatch_size 2 --epochs 1".split()
    words += ["--device", "cpu", "--output_dir", tmp_path / "rloo"]
    done = run_script("examples/relatives_with_trl.py", *words, cwd=chain)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "rloo/args.json").read_text())["args"]["beta"] > 0
    (row,) = [json.loads(line) for line in (tmp_path / "rloo/metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 1 and row["seconds"] > 0
    trained, before = weights(tmp_path / "rloo"), weights(chain / "out/sft")
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate import DistributedType, PartialState

        init = PartialState.__init__  # on CPU accelerate would not shard, without a word

        def as_if_on_gpus(self, *args, **options):
            init(self, *args, **options)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = as_if_on_gpus
    example.P3OTrainer._generate_single_turn = fixed_responses([])
    accelerator = example.main(sys.argv[1:]).accelerator
    print(f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}", flush=True)
    accelerator.end_training()
