"""Log-probs, scores, masks, sampling and loading against unpadded loops in float64 and the library's numbers."""

import importlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import p3o
import sft

VOCAB, EOS = 23, 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3, "eos_token_id": EOS, "bos_token_id": None}
SIZES |= {"max_position_embeddings": 64}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON),
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **SIZES, **COMMON),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, **COMMON),
    "qwen2": transformers.Qwen2Config(num_key_value_heads=2, **SIZES, **COMMON),
}
KINDS = (AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 1})


def words(pad=EOS):
    return word_tokenizer(VOCAB, EOS, pad)


def make(name, kind, dtype=torch.float64, **changes):
    """A random model in eval mode. kind is 1 for a language model and 2 for a sequence classifier."""
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
    return KINDS[kind - 1][0].from_config(config).to(dtype).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    return make(request.param, 1)


def draw(rows=5, seed=0, longest=9):
    """Random prompts and responses of different lengths; some responses hold EOS, and pad, in the middle."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows, 2), generator=g).tolist()
    return [[torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in pair] for pair in lengths]


def batch_of(rows, pad_id=0, extra_left=0, extra_right=0):
    """The token tensors of a batch by name, padded, with columns of padding to spare."""
    batch = {}
    for part, (name, extra) in enumerate((("prompt", extra_left), ("response", extra_right))):
        length = max(len(row[part]) for row in rows) + extra
        ids = torch.full((len(rows), length), pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, row in enumerate(rows):
            columns = slice(length - len(row[0]), length) if name == "prompt" else slice(0, len(row[1]))
            ids[b, columns], mask[b, columns] = torch.tensor(row[part]), True
        batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return batch


@torch.no_grad()
def naive_logps(model, row, temperature=1.0):
    """log p of each response token, a forward pass for each: no padding, mask or positions; float64."""
    prompt, response = row
    values = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double() / temperature
        values.append((logits[token] - torch.logsumexp(logits, 0)).item())
    return values


def assert_rows(result, rows, expected, atol=2e-6):
    """Every real token has its expected value, everything else is exactly 0."""
    for got, row, want in zip(result, rows, expected, strict=True):
        n = len(row[1])
        torch.testing.assert_close(got[:n].double(), torch.tensor(want).double(), atol=atol, rtol=1e-6)
        assert (got[n:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_an_unpadded_loop(lm, temperature):
    rows = draw()
    result = p3o.response_logps(lm, **batch_of(rows), temperature=temperature)
    assert result.dtype == torch.float32 and result.shape == (5, max(len(row[1]) for row in rows))
    assert_rows(result, rows, [naive_logps(lm, row, temperature) for row in rows])


def test_logps_are_the_librarys_own_loss(lm):
    """transformers' loss, with prompt and padding labelled -100, is our mean per response token, and sft.py's."""
    batch = batch_of(draw(seed=2))
    inputs = p3o.model_inputs(**batch)
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["response_mask"]], 1)
    output = lm(**inputs, labels=inputs["input_ids"].masked_fill(~counted, -100))
    mean = p3o.response_logps(lm, **batch).sum() / batch["response_mask"].sum()
    found = sft.completion_loss(output.logits, inputs["input_ids"], counted)
    assert [-mean.item(), found.item()] == pytest.approx([output.loss.item()] * 2, abs=1e-6)


def test_padding_changes_nothing(lm):
    """Neither padding, nor its content (EOS, any token), nor the batch's other rows show in the result."""
    rows = draw(4, seed=3)
    plain = p3o.response_logps(lm, **batch_of(rows))
    length = plain.shape[1]
    batch = batch_of(rows, 0, 4, 4)
    for part in ("prompt", "response"):
        padding = ~batch[f"{part}_mask"]
        batch[f"{part}_ids"][padding] = torch.randint(0, VOCAB, (padding.sum(),))
    for padded in (batch, batch_of(rows, EOS), batch_of(rows, EOS, 6, 5)):
        result = p3o.response_logps(lm, **padded)
        torch.testing.assert_close(result[:, :length], plain, atol=1e-6, rtol=1e-6)
        assert (result[:, length:] == 0).all()
    part = p3o.response_logps(lm, **batch_of([rows[b] for b in (3, 1)], 0, 2))
    torch.testing.assert_close(part, plain[[3, 1], : part.shape[1]], atol=1e-6, rtol=1e-6)


ARGS = {"device": "cpu", "temperature": 0.9, "response_length": 6, "prompt_length": 9, "micro_batch_size": 2}
ARGS |= {"num_responses": 3}
SAMPLING = {"do_sample": True, "top_k": 0, "eos_token_id": EOS, "pad_token_id": EOS}


def rollout(name):
    """A scored batch of 4 prompts with 3 responses each, the models, and the prompts."""
    policy, reference = make(name, 1, torch.float32), make(name, 1, torch.float32, initializer_range=0.2)
    policy.generation_config = GenerationConfig(**SAMPLING, temperature=0.9, max_new_tokens=6)
    scorer, args = make(name, 2, torch.float32, num_labels=1), p3o.Args(**ARGS)
    prompts = [prompt for prompt, _ in draw(4, seed=8)]
    rows = [{"prompt": f"prompt {n}", "prompt_ids": prompt} for n, prompt in enumerate(prompts)]
    torch.manual_seed(0)
    batch = p3o.sample_batch(policy, rows, 3, words(), args)
    reward = lambda part: p3o.read_score(scorer, **p3o.token_rows(part, slice(None)))  # noqa: E731
    p3o.score_batch(batch, policy, reference, reward, args)
    return batch, (policy, reference, scorer), prompts


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_numbers_equal_a_loop_and_the_first_ratio_is_exactly_one(name):
    """Each row alone and unpadded, in float64. Old log-probs come from the forward pass of training."""
    batch, (policy, reference, scorer), prompts = rollout(name)
    for rows in (slice(0, 6), slice(6, 12)):
        new = p3o.response_logps(policy, **p3o.token_rows(batch, rows), temperature=0.9)
        assert new.requires_grad and torch.equal(new, batch["logp_old_tok"][rows])
    assert batch["score"].dtype == torch.float64 and not batch["logp_old_tok"].requires_grad
    models = {"logp_old_tok": policy.double(), "logp_ref_tok": reference.double()}
    scorer.double()
    for n in range(12):
        ids, prompt = batch["response_ids"][n][batch["response_mask"][n]].tolist(), prompts[n // 3]
        assert batch["prompt_ids"][n][batch["prompt_mask"][n]].tolist() == prompt
        for which, model in models.items():
            assert_rows([batch[which][n]], [(prompt, ids)], [naive_logps(model, (prompt, ids), 0.9)], 1e-4)
        ended = ids[-1] == EOS
        score = scorer(torch.tensor([prompt + ids])).logits.item()  # the library's own
        expected = score - (0 if ended else 1.0)
        assert batch["ended"][n] == ended and batch["score"][n].item() == pytest.approx(expected, abs=1e-4)
    assert 0 < batch["ended"].sum() < 12, "both cases should occur"


WRONG = [0.5, torch.tensor(0.5), torch.ones(2), torch.ones(3, 1), [1.0, 2.0], None, "good", {}]
WRONG += [[1, bad, 3] for bad in (math.nan, math.inf, -math.inf, None, "2", [2.0], torch.tensor(math.nan))]


@pytest.mark.parametrize("script", ["p3o", "ppo", "dpo", "evaluate"])
def test_a_reward_is_n_finite_numbers_or_the_run_ends(script):
    """One number for N responses would be given to all of them, and nothing would be learnt."""
    compute_scores = importlib.import_module(script).compute_scores
    batch = {"prompt": ["p"] * 3, "response": ["first", "second", "third"]}
    for right in ([1, 2.5, True], torch.tensor([1, 2.5, 1]), torch.tensor([1, 2.5, 1]).numpy()):
        assert compute_scores(lambda part: right, batch) == [1, 2.5, 1]
    for wrong in WRONG:
        with pytest.raises(SystemExit, match=r"^error: the reward [^\n]*; return a [^\n]*$") as stop:
            compute_scores(lambda part: wrong, batch)
        if isinstance(wrong, list) and len(wrong) == 3:
            assert f"response 'second' is {wrong[1]!r}" in stop.value.code


@pytest.mark.parametrize("clipping", ["joint", "separate", "none"])
@pytest.mark.parametrize("size, max_norm", [(1, 1e9), (2, 1e9), (2, 0.5)])
def test_an_update_descends_the_loss_of_its_prompts(clipping, size, max_norm):
    """After the policy has moved, on 3 of 4 prompts: the gradient of the loss over log-probs of unpadded texts."""
    batch, (policy, *_), prompts = rollout("gpt2")
    reward = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += 0.005 * noise
    minibatch, rows, new = torch.tensor([2, 0, 3]), [6, 7, 8, 0, 1, 2, 9, 10, 11], []
    for n in rows:
        ids = batch["response_ids"][n][batch["response_mask"][n]].tolist()
        logits = policy(torch.tensor([prompts[n // 3] + ids])).logits[0, len(prompts[n // 3]) - 1 : -1]
        new.append(torch.log_softmax(logits / 0.9, -1)[range(len(ids)), ids].sum())
    new, old = torch.stack(new).view(3, 3), batch["logp_old_tok"][rows].sum(1).view(3, 3)
    if clipping == "none":
        loss, clipped = p3o.pairwise_policy_gradient_loss(new, reward[minibatch]), 0.0
    else:
        loss, stats = p3o.p3o_loss(new, old, reward[minibatch], 0.2, clipping, 1.5)
        assert 0 < (clipped := stats["clip_fraction"]) < 1, "both sides of the clip must occur"
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    options = {"clipping": clipping, "max_importance_weight": 1.5, "max_grad_norm": max_norm}
    args = p3o.Args(**ARGS | {"micro_batch_size": size} | options)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)  # its step shows the gradient
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    metrics = p3o.update_policy(policy, optimizer, batch, reward, minibatch, args)
    moved = before - torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    norm = expected.norm().item()
    assert norm > 0.6
    torch.testing.assert_close(moved / 0.1, expected * min(1, max_norm / norm), rtol=1e-4, atol=1e-4)
    wanted = {"loss": loss.item(), "clip_fraction": clipped, "grad_norm": norm}
    wanted["log_ratio_max"] = (new - old).abs().max().item()
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert all(p.grad is None for p in policy.parameters()), "gradient left over"


def test_metrics_of_a_batch_by_hand():
    """Responses of 1, 3 and 2 tokens, in one batch or in two."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    old, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.25, -3.125])
    batch = {"logp_old_tok": old * mask, "logp_ref_tok": ref * mask, "response_mask": mask}
    batch |= {"score": torch.tensor([1.0, 2.0, 9.0]).double(), "ended": torch.tensor([True, False, True])}
    expected = {"reward": 4, "kl": (3 * 0.5 + 2 * 0.25 + 0.125) / 3, "entropy": (3 * 1 + 2 * 2 + 3) / 6}
    expected |= {"response_length": 2, "eos_rate": 2 / 3}
    for parts in ([slice(0, 3)], [slice(0, 2), slice(2, 3)]):
        found = p3o.batch_metrics([{name: values[part] for name, values in batch.items()} for part in parts])
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pad", [EOS, 0])
def test_the_first_eos_counts_and_nothing_behind_it_by_hand(pad):
    e, x = EOS, 9
    cases = {  # ids: (how many tokens count, EOS included; whether it has ended; text)
        (x, x, x, x): (4, False, "w9 w9 w9 w9"),
        (x, x, e, x): (3, True, "w9 w9"),
        (x, e, e, e): (2, True, "w9"),  # pad == EOS: the first one counts, once
        (e, x, e, x): (1, True, ""),
        (x, e, 0, 0): (2, True, "w9"),  # another pad
    }
    answers = lambda input_ids, **options: torch.cat([input_ids, torch.tensor(list(cases))], 1)  # noqa: E731
    rows = [{"prompt": "w3", "prompt_ids": [3]}] * len(cases)
    batch = p3o.sample_batch(SimpleNamespace(generate=answers), rows, 1, words(pad), p3o.Args(**ARGS))
    assert batch["response_ids"].tolist() == [list(ids) for ids in cases]
    masks = [[t < count for t in range(4)] for count, _, _ in cases.values()]
    found = batch["response_mask"].tolist(), batch["ended"].tolist(), batch["response"]
    assert [*zip(*found)] == [(mask, *want[1:]) for mask, want in zip(masks, cases.values())]


def policy_of_main(model, monkeypatch, folder, **options):
    """The policy as p3o.py's main sets it up from a saved model. Step 0 has saved it to run/."""
    model.save_pretrained(folder / "lm")
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        (folder / f"data/{split}.jsonl").write_text(json.dumps({"prompt": "w3"}) + "\n")

    def capture(step, policy, *others):
        raise InterruptedError(policy)

    monkeypatch.setattr(p3o, "train_step", capture)
    monkeypatch.setattr(p3o, "load_tokenizer", lambda args: words())
    monkeypatch.setattr(p3o, "load_reward", lambda *args: lambda batch: [0.0] * len(batch["response"]))
    places = {"model": folder / "lm", "dataset": folder / "data", "output_dir": folder / "run"}
    with pytest.raises(InterruptedError) as captured:
        p3o.main(p3o.Args(**{name: str(path) for name, path in places.items()}, device="cpu", **options))
    return captured.value.args[0]


def sample(policy, prompts, K):
    rows = [{"prompt": "", "prompt_ids": prompt} for prompt in prompts]
    torch.manual_seed(0)
    batch = p3o.sample_batch(policy, rows, K, words(), p3o.Args(device="cpu"))
    return batch["response_ids"], batch["response_mask"]


@pytest.mark.parametrize("name, temperature", [*zip(CONFIGS, [1.0, 0.7, 1.0, 0.7])])
def test_samples_follow_the_models_own_distribution(name, temperature, monkeypatch, tmp_path):
    """Against exact probabilities (chi-square), on a model whose own defaults (top-k, penalties) would ruin it."""
    model = make(name, 1, torch.float32, vocab_size=VOCAB, initializer_range=0.15)
    own = dict(do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=0.1, min_new_tokens=2)
    model.generation_config = GenerationConfig(**own)
    options = {"temperature": temperature, "prompt_length": 4, "response_length": 2}
    policy = policy_of_main(model, monkeypatch, tmp_path, **options)
    prompts, n = [[2, 5, 5, 3], [4]], 2000
    ids, mask = sample(policy, prompts, n)
    assert mask[:, 0].all() and torch.equal(mask[:, 1], ids[:, 0] != EOS)

    def exact(prompt, *before):
        rows = [(prompt, [*before, t]) for t in range(VOCAB)]
        return torch.tensor([naive_logps(policy, row, temperature)[-1] for row in rows]).exp()

    for prompt, drawn in zip(prompts, ids.split(n)):
        firsts = exact(prompt)
        assert_chi_square(drawn[:, 0].bincount(minlength=VOCAB), firsts * n)
        likely = int(firsts.masked_fill(torch.arange(VOCAB) == EOS, 0).argmax())
        seconds = drawn[drawn[:, 0] == likely, 1]
        assert len(seconds) > 100
        assert_chi_square(seconds.bincount(minlength=VOCAB), exact(prompt, likely) * len(seconds))


def assert_chi_square(counts, expected):
    """Cells that expect fewer than 5 hits are put together."""
    assert expected.sum().item() == pytest.approx(counts.sum().item(), rel=1e-4)
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    hits, means = (torch.cat(parts) for parts in zip(*cells))
    statistic, freedom = ((hits - means) ** 2 / means.clamp(min=1)).sum().item(), len(means) - 1
    assert freedom > 3 and statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # its mean and deviation


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_saved_policy_samples_as_in_training(name, monkeypatch, tmp_path):
    """And so does plain transformers, although the model came with other ends of text and other sampling."""
    model = make(name, 1, torch.float32, eos_token_id=5, pad_token_id=7, initializer_range=0.1)
    model.generation_config = GenerationConfig(eos_token_id=[5, 6], do_sample=True, top_k=2)
    options = {"temperature": 0.8, "prompt_length": 4, "response_length": 8}
    ids, mask = sample(policy_of_main(model, monkeypatch, tmp_path, **options), [[3, 4]], 50)
    assert ids.shape == (50, 8) and EOS in ids and (ids[~mask] == EOS).all(), "ends at EOS"
    assert all((ids[:, 1:][ids[:, :-1] == token] != EOS).any() for token in (5, 6)), "and nowhere else"
    plain, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), torch.tensor([[3, 4]] * 50)
    torch.manual_seed(0)
    assert torch.equal(plain.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 2:], ids)


def saved(model, folder, tensors=None, **config):
    """Saves the model; tensors and config then change what is in the folder, but not the other one of the two."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | (tensors or {})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(record))
    return str(folder)


LORA = {"model.layers.0.lora_A": torch.ones(2, 2)}
REFUSED = {  # name: (0 a policy, or 1 a reward model; what is made with the folder; a part of the line)
    "no score head": (1, ("gpt2", 1), {}, "lacks the weights ['score.weight']"),
    "a layer missing": (0, ("gpt2", 1), {"n_layer": 3}, "lacks the weights ['transformer.h.2."),
    "reward model as policy": (0, ("gpt2", 2), {}, "holds ['score.weight'], which would be ignored"),
    "LoRA": (0, ("qwen2", 1), {"tensors": LORA}, "lora_A'], which would be"),
    "few embeddings": (0, ("gpt2", 1, VOCAB - 1), {}, f"too few for token id {VOCAB - 1}; resize them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_half_read_are_refused(case, tmp_path):
    as_reward, (name, kind, *size), changes, line = REFUSED[case]
    model = make(name, kind, torch.float32, num_labels=1, pad_token_id=0, vocab_size=(*size, VOCAB)[0])
    folder = saved(model, tmp_path / "m", **changes)
    with pytest.raises(SystemExit) as stop:
        p3o.load_model(KINDS[as_reward][0], folder, words(), p3o.Args(device="cpu"), **KINDS[as_reward][1])
    assert re.fullmatch(f"error: {folder} .*{re.escape(line)}.*", stop.value.code) and "; " in stop.value.code


def test_a_model_loads_in_float32_with_a_head_to_spare_but_without_an_adapter_and_in_its_positions(tmp_path):
    """A reward model may carry the head of the language model that it began as."""
    scorer, args = make("llama", 2, torch.bfloat16, num_labels=1, pad_token_id=0), p3o.Args(device="cpu")
    folder = saved(scorer, tmp_path / "m", tensors={"lm_head.weight": torch.ones(VOCAB, 32)})
    args.prompt_length = args.response_length = 32
    load = lambda: p3o.load_model(KINDS[1][0], folder, words(), args, num_labels=1)  # noqa: E731
    found = load()
    assert found.dtype == torch.float32 and not found.training
    assert all(map(torch.equal, found.parameters(), scorer.float().parameters()))
    args.response_length = 33
    with pytest.raises(SystemExit, match="takes at most 64 tokens; lower --prompt_length"):
        load()
    (tmp_path / "m/adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^error: .* holds \['adapter_config.json'\]"):
        load()
