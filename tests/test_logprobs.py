"""Log-probs, scores, masks, sampling and loading of the RL scripts against unpadded loops and the library's numbers.

The models are tiny random GPT-2, Llama, GPT-NeoX and Qwen2 models, whose weights are so large that every token
matters. The oracles run each row alone, without padding, in float64.
"""

import importlib
import json
import math

import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

import p3o
import sft

VOCAB, EOS = 23, 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3, "eos_token_id": EOS, "bos_token_id": None}
SIZES |= {"max_position_embeddings": 64}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON),
    "llama": LlamaConfig(num_key_value_heads=2, **SIZES, **COMMON),
    "gpt_neox": GPTNeoXConfig(**SIZES, **COMMON),
    "qwen2": Qwen2Config(num_key_value_heads=2, **SIZES, **COMMON),
}


KINDS = (AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 1})


# ---------------------------------------------------------------------------------------------------- helpers
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


@pytest.fixture(scope="module", params=CONFIGS)
def scorer(request):
    return make(request.param, 2, torch.float32, num_labels=1, pad_token_id=0)


def draw(rows=5, seed=0, longest=9):
    """Random prompts and responses of different lengths. Some responses hold EOS and pad in the middle."""
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
    """log p of each response token, by a forward pass for each without padding, mask or positions, in float64."""
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


# -------------------------------------------------------------------------------------------------- log-probs
def test_logps_equal_an_unpadded_loop(lm):
    rows = draw()
    result = p3o.response_logps(lm, **batch_of(rows))
    assert result.dtype == torch.float32
    assert result.shape == (5, max(len(row[1]) for row in rows))
    assert_rows(result, rows, [naive_logps(lm, row) for row in rows])


@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_temperature_divides_the_logits(lm, temperature):
    rows = draw(3, seed=1)
    result = p3o.response_logps(lm, **batch_of(rows), temperature=temperature)
    assert_rows(result, rows, [naive_logps(lm, row, temperature) for row in rows])


def test_logps_are_the_librarys_own_loss(lm):
    """transformers' loss, with prompt and padding labelled -100, is our mean per response token, and sft.py's."""
    batch = batch_of(draw(seed=2))
    inputs = p3o.model_inputs(**batch)
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["response_mask"]], 1)
    output = lm(**inputs, labels=inputs["input_ids"].masked_fill(~counted, -100))
    mean = p3o.response_logps(lm, **batch).sum() / batch["response_mask"].sum()
    assert output.loss.item() == pytest.approx(-mean.item(), abs=1e-6)
    found = sft.completion_loss(output.logits, inputs["input_ids"], counted)
    assert found.item() == pytest.approx(output.loss.item(), abs=1e-6)


def test_padding_changes_nothing(lm):
    """Neither padding, nor its content (EOS, any token), nor the batch's other rows show in the result."""
    rows = draw(4, seed=3)
    plain = p3o.response_logps(lm, **batch_of(rows))
    length = plain.shape[1]
    for pad_id, left, right in ((EOS, 0, 0), (7, 1, 0), (VOCAB - 1, 0, 3), (EOS, 6, 5)):
        result = p3o.response_logps(lm, **batch_of(rows, pad_id, left, right))
        torch.testing.assert_close(result[:, :length], plain, atol=1e-6, rtol=1e-6)
        assert (result[:, length:] == 0).all()
    batch = batch_of(rows, 0, 4, 4)
    for part in ("prompt", "response"):
        padding = ~batch[f"{part}_mask"]
        batch[f"{part}_ids"][padding] = torch.randint(0, VOCAB, (padding.sum(),))
    torch.testing.assert_close(p3o.response_logps(lm, **batch)[:, :length], plain, atol=1e-6, rtol=1e-6)
    for order in ([3, 1, 0, 2], [2], [0, 0, 3]):
        part = p3o.response_logps(lm, **batch_of([rows[b] for b in order], 0, 2))
        torch.testing.assert_close(part, plain[order][:, : part.shape[1]], atol=1e-6, rtol=1e-6)


def test_gradients_flow_and_none_from_masked_positions(lm):
    """The gradient of a padded batch is that of its rows alone, and masked positions give none at all."""
    rows = draw(3, seed=6)
    weights = [
        torch.randn(len(row[1]), generator=torch.Generator().manual_seed(b)) for b, row in enumerate(rows)
    ]

    def gradient(batch, weight):
        lm.zero_grad()
        (p3o.response_logps(lm, **batch) * weight).sum().backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    batch = batch_of(rows, 0, 3, 3)
    weight = torch.full(batch["response_ids"].shape, 1e6)  # a heavy weight behind the mask must not show
    for b, w in enumerate(weights):
        weight[b, : len(w)] = w
    padded = gradient(batch, weight)
    alone = sum(gradient(batch_of([row]), w.unsqueeze(0)) for row, w in zip(rows, weights))
    assert padded.isfinite().all() and padded.abs().max() > 0.1
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    assert gradient(batch, 1.0 * ~batch["response_mask"]).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_whatever_the_models_dtype(name):
    """With bfloat16 weights or autocast the log-probs are float32, normalised, and near the exact ones."""
    batch = batch_of(draw(seed=7))
    exact = p3o.response_logps(make(name, 1), **batch)
    every = batch_of([[[3, 5], [token]] for token in range(VOCAB)])  # all responses of one token
    for dtype in (torch.bfloat16, torch.float32):
        model = make(name, 1, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logps, total = p3o.response_logps(model, **batch), p3o.response_logps(model, **every).exp().sum()
        assert logps.dtype == torch.float32 and (logps - exact).abs().mean() < 0.1
        assert total.item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_score_head_stays_in_float32(name):
    """In bfloat16 scores are off by what the trunk's states are, and by nothing more."""
    model, batch = make(name, 2, torch.float32, num_labels=1), batch_of(draw(seed=7))
    last = batch["prompt_ids"].shape[1] - 1 + batch["response_mask"].sum(1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = p3o.read_score(model, **batch)
        states = model.base_model(**p3o.model_inputs(**batch), use_cache=False).last_hidden_state
        rounded = model.score(states)[:, :, 0].float().gather(1, last)[:, 0]
    by_hand = (states.double() @ model.score.weight[0].double()).float().gather(1, last)[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)
    assert (rounded - by_hand).abs().max() > 1e-3, "a head in bfloat16 would show here"
    exact = p3o.read_score(model, **batch)
    assert 0 < (found - exact).abs().mean() < 0.1


# ------------------------------------------------------------------------------------------ rollout and update
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
def test_first_ratio_is_exactly_one(name):
    """Old log-probs come from the forward pass of training. On the same rows no bit differs."""
    (batch, (policy, *_), _), args = rollout(name), p3o.Args(**ARGS)
    for rows in (slice(0, 6), slice(6, 12)):
        new = p3o.response_logps(policy, **p3o.token_rows(batch, rows), temperature=0.9)
        assert new.requires_grad and torch.equal(new, batch["logp_old_tok"][rows])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    reward = torch.randn(4, 3, dtype=torch.float64)
    update = p3o.update_policy(policy, optimizer, batch, reward, torch.tensor([2, 0, 3, 1]), args)
    assert update["log_ratio_max"] < 1e-4 and update["grad_norm"] > 0  # other batches round differently


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_numbers_equal_a_loop(name):
    """Log-probs and score of a rollout, each row alone and unpadded, in float64."""
    batch, models, prompts = rollout(name)
    policy, reference, scorer = (model.double() for model in models)
    assert batch["score"].dtype == torch.float64 and not batch["logp_old_tok"].requires_grad
    for n in range(12):
        ids, prompt = batch["response_ids"][n][batch["response_mask"][n]].tolist(), prompts[n // 3]
        assert batch["prompt_ids"][n][batch["prompt_mask"][n]].tolist() == prompt
        assert batch["prompt"][n] == f"prompt {n // 3}"
        for which, model in (("logp_old_tok", policy), ("logp_ref_tok", reference)):
            assert_rows([batch[which][n]], [(prompt, ids)], [naive_logps(model, (prompt, ids), 0.9)], 1e-4)
        hidden = scorer.base_model(torch.tensor([prompt + ids])).last_hidden_state[0, -1]
        ended = ids[-1] == EOS
        assert batch["ended"][n].item() == ended
        expected = scorer.score(hidden).item() - (0 if ended else 1.0)
        assert batch["score"][n].item() == pytest.approx(expected, abs=1e-4)
    assert 0 < batch["ended"].sum() < 12, "both cases should occur"


def test_a_reward_of_ones_own_is_given_texts():
    """The reward may be any function of a batch. It is called on parts, in order."""
    batch, (policy, reference, _), _ = rollout("gpt2")
    args, seen = p3o.Args(**ARGS | {"micro_batch_size": 3}, missing_eos_penalty=2.0), []

    def reward(part):
        seen.append(len(part["response"]))
        return [100 * int(p.split()[1]) + len(r) for p, r in zip(part["prompt"], part["response"])]

    p3o.score_batch(batch, policy, reference, reward, args)
    lengths, penalties = [len(text) for text in batch["response"]], (2.0 * ~batch["ended"]).tolist()
    expected = [100.0 * (n // 3) + lengths[n] - penalties[n] for n in range(12)]
    assert batch["score"].tolist() == expected and seen == [9, 3] and batch["score"].dtype == torch.float64


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
        with pytest.raises(SystemExit) as stop:
            compute_scores(lambda part: wrong, batch)
        assert stop.value.code.startswith("error: the reward ") and "; return a " in stop.value.code
        assert "\n" not in stop.value.code and len(stop.value.code) < 200
        if isinstance(wrong, list) and len(wrong) == 3:
            assert f"response 'second' is {wrong[1]!r}" in stop.value.code


@pytest.mark.parametrize("clipping", ["joint", "separate", "none"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_update_descends_the_loss_of_its_prompts(clipping, size):
    """After the policy has moved, on 3 of 4 prompts, whatever the micro-batches: the gradient of the loss over
    log-probs of unpadded texts, one after another."""
    batch, (policy, *_), prompts = rollout("gpt2")
    reward = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += 0.005 * noise
    minibatch, rows = torch.tensor([2, 0, 3]), [6, 7, 8, 0, 1, 2, 9, 10, 11]
    new = []
    for n in rows:
        ids = batch["response_ids"][n][batch["response_mask"][n]].tolist()
        logits = policy(torch.tensor([prompts[n // 3] + ids])).logits[0, len(prompts[n // 3]) - 1 : -1]
        new.append(torch.log_softmax(logits / 0.9, -1)[range(len(ids)), ids].sum())
    new, old = torch.stack(new).view(3, 3), batch["logp_old_tok"][rows].sum(1).view(3, 3)
    if clipping == "none":
        loss, clipped = p3o.pairwise_policy_gradient_loss(new, reward[minibatch]), 0.0
    else:
        loss, stats = p3o.p3o_loss(new, old, reward[minibatch], 0.2, clipping, 1.5)
        clipped = stats["clip_fraction"]
        assert 0 < clipped < 1, "both sides of the clip must occur"
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    options = {"clipping": clipping, "max_importance_weight": 1.5, "max_grad_norm": 1e9}
    args = p3o.Args(**ARGS | {"micro_batch_size": size} | options)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)  # its step shows the gradient

    def update():
        before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
        metrics = p3o.update_policy(policy, optimizer, batch, reward, minibatch, args)
        return metrics, before - torch.nn.utils.parameters_to_vector(policy.parameters()).detach()

    metrics, moved = update()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(moved / 0.1, expected, rtol=1e-4, atol=1e-4)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert metrics["log_ratio_max"] == pytest.approx((new - old).abs().max().item(), abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert all(p.grad is None for p in policy.parameters()), "gradient left over"
    args.max_grad_norm, optimizer.param_groups[0]["lr"] = 1e-4, 10.0
    assert update()[1].norm().item() / 10 == pytest.approx(1e-4, rel=1e-2), "clipped"


def test_metrics_of_a_batch_by_hand():
    """Six responses of 1 to 3 tokens, in one batch or in two."""
    lengths = [2, 2, 3, 2, 1, 3]
    mask = torch.tensor([[t < n for t in range(3)] for n in lengths])
    old, ref = [-1.0, -2.0, -3.0], [-1.5, -2.25, -3.125]
    batch = {"logp_old_tok": torch.tensor([old] * 6) * mask, "logp_ref_tok": torch.tensor([ref] * 6) * mask}
    batch |= {"response_mask": mask, "ended": torch.tensor([True] * 5 + [False])}
    batch["score"] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], dtype=torch.float64)
    kl = sum(sum(old[:n]) - sum(ref[:n]) for n in lengths) / 6
    expected = {"reward": 4.0, "kl": kl, "entropy": -sum(sum(old[:n]) for n in lengths) / 13}
    expected |= {"response_length": 13 / 6, "eos_rate": 5 / 6}
    for parts in ([slice(0, 6)], [slice(0, 4), slice(4, 6)]):
        found = p3o.batch_metrics([{name: values[part] for name, values in batch.items()} for part in parts])
        assert found == pytest.approx(expected, rel=1e-6)
        assert all(type(value) is float for value in found.values())


# ----------------------------------------------------------------------------------------------------- scores
def test_scores_are_the_librarys_own_on_unpadded_input(scorer):
    """transformers' own forward, one row at a time, with its last-token rule: ids free of its pad id."""
    rows = [[[max(x, 2) for x in part] for part in row] for row in draw(seed=9)]
    with torch.no_grad():
        expected = torch.stack([scorer(torch.tensor([p + r])).logits[0, 0] for p, r in rows]).float()
    assert expected.std() > 0.1
    for pad_id, left, right in ((0, 0, 0), (EOS, 5, 0), (7, 0, 4), (EOS, 3, 3)):
        result = p3o.read_score(scorer, **batch_of(rows, pad_id, left, right))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_score_is_read_by_position_whatever_the_tokens_are(scorer):
    """Responses that end in EOS or hold the pad id: the hidden state of the last real token, by hand."""
    rows = [row[:1] + [row[1] + [EOS]] for row in draw(3, seed=10)] + [[[0, 0], [0]], [[EOS], [4, 0]]]
    with torch.no_grad():
        hidden = [scorer.base_model(torch.tensor([p + r])).last_hidden_state[0, -1] for p, r in rows]
        expected = torch.stack([scorer.score(h)[0] for h in hidden]).float()
    for pad_id in (0, EOS):
        result = p3o.read_score(scorer, **batch_of(rows, pad_id, 2, 2))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ masks and padding
class Fixed:
    """A policy whose answers are given."""

    def __init__(self, answers):
        self.answers = torch.tensor(answers)

    def generate(self, input_ids, attention_mask, **options):
        assert torch.equal(input_ids[attention_mask == 1], torch.full((len(self.answers),), 3))
        return torch.cat([input_ids, self.answers], 1)


def answers(ids, pad=EOS):
    """The batch of a policy that answers with these ids, each row to a prompt of its own."""
    rows = [{"prompt": "w3", "prompt_ids": [3]}] * len(ids)
    return p3o.sample_batch(Fixed(ids), rows, 1, words(pad), p3o.Args(**ARGS))


@pytest.mark.parametrize("pad", [EOS, 0])
def test_the_first_eos_counts_and_nothing_behind_it_by_hand(pad):
    e, x = EOS, 9
    cases = {
        (x, x, x, x): ([1, 1, 1, 1], False, "w9 w9 w9 w9"),  # no EOS: everything counts
        (x, x, e, x): ([1, 1, 1, 0], True, "w9 w9"),
        (x, e, e, e): ([1, 1, 0, 0], True, "w9"),  # pad == EOS: the first one counts, once
        (e, e, e, e): ([1, 0, 0, 0], True, ""),
        (e, x, e, x): ([1, 0, 0, 0], True, ""),
        (x, x, x, e): ([1, 1, 1, 1], True, "w9 w9 w9"),
        (x, e, 0, 0): ([1, 1, 0, 0], True, "w9"),  # another pad
    }
    batch = answers(list(cases), pad)
    assert batch["response_mask"].dtype == batch["ended"].dtype == torch.bool
    assert batch["response_ids"].tolist() == [list(ids) for ids in cases]
    assert batch["response_mask"].tolist() == [[bool(v) for v in want[0]] for want in cases.values()]
    assert batch["ended"].tolist() == [want[1] for want in cases.values()]
    assert batch["response"] == [want[2] for want in cases.values()]


# --------------------------------------------------------------------------------------------------- sampling
class Captured(Exception):
    pass


def policy_of_main(model, monkeypatch, folder, **options):
    """The policy as p3o.py's main sets it up from a saved model, and the tokenizer. Step 0 has saved it to run/."""
    model.save_pretrained(folder / "lm")
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        (folder / f"data/{split}.jsonl").write_text(json.dumps({"prompt": "w3"}) + "\n")

    def capture(step, policy, reference, reward, optimizer, prompts, offset, tokenizer, args):
        raise Captured(policy, tokenizer)

    monkeypatch.setattr(p3o, "train_step", capture)
    monkeypatch.setattr(p3o, "load_tokenizer", lambda args: words())
    monkeypatch.setattr(p3o, "load_reward", lambda *args: lambda batch: [0.0] * len(batch["response"]))
    places = {"model": folder / "lm", "dataset": folder / "data", "output_dir": folder / "run"}
    with pytest.raises(Captured) as captured:
        p3o.main(p3o.Args(**{name: str(path) for name, path in places.items()}, device="cpu", **options))
    return captured.value.args


def sample(policy, tokenizer, prompts, K):
    rows = [{"prompt": "", "prompt_ids": prompt} for prompt in prompts]
    torch.manual_seed(0)
    batch = p3o.sample_batch(policy, rows, K, tokenizer, p3o.Args(device="cpu"))
    return batch["response_ids"], batch["response_mask"]


@pytest.mark.parametrize("name, temperature", [*zip(CONFIGS, [1.0, 0.7, 1.0, 0.7])])
def test_samples_follow_the_models_own_distribution(name, temperature, monkeypatch, tmp_path):
    """Two tokens are sampled 2000 times from each of two prompts. A chi-square test compares them with the exact
    probabilities. The defaults of the model (top-k, penalties, a least length) would ruin it."""
    model = make(name, 1, torch.float32, vocab_size=VOCAB, initializer_range=0.15)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=0.1, min_new_tokens=2
    )
    options = {"temperature": temperature, "prompt_length": 4, "response_length": 2}
    policy, tokenizer = policy_of_main(model, monkeypatch, tmp_path, **options)
    prompts, n = [[2, 5, 5, 3], [4]], 2000
    ids, mask = sample(policy, tokenizer, prompts, n)
    assert ids.shape == mask.shape == (2 * n, 2) and mask[:, 0].all()
    assert torch.equal(mask[:, 1], ids[:, 0] != EOS)
    for b, prompt in enumerate(prompts):
        found = ids[b * n : (b + 1) * n]
        likely = found[found[:, 0] != EOS, 0].mode().values.item()
        for before, tokens in (([], found[:, 0]), ([likely], found[found[:, 0] == likely, 1])):
            rows = [(prompt, [*before, token]) for token in range(VOCAB)]
            p = torch.tensor([naive_logps(policy, row, temperature)[-1] for row in rows]).exp()
            assert len(tokens) > 100
            assert_chi_square(tokens.bincount(minlength=VOCAB), p * len(tokens))


def assert_chi_square(counts, expected):
    """Cells that expect fewer than 5 hits are put together."""
    assert expected.sum().item() == pytest.approx(counts.sum().item(), rel=1e-4)
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    hits, means = (torch.cat(parts) for parts in zip(*cells))
    statistic, freedom = ((hits - means) ** 2 / means.clamp(min=1)).sum().item(), len(means) - 1
    assert freedom > 3 and statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # its mean and deviation


def test_every_token_can_be_sampled(monkeypatch, tmp_path):
    """The vocabulary is larger than the library's default top-k of 50."""
    model = make("gpt2", 1, torch.float32, vocab_size=200, initializer_range=0.02)
    policy, tokenizer = policy_of_main(model, monkeypatch, tmp_path, prompt_length=4, response_length=1)
    ids, _ = sample(policy, tokenizer, [[3, 4]], 3000)
    assert len(ids.unique()) > 190


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_saved_policy_samples_as_in_training(name, monkeypatch, tmp_path):
    """Plain transformers draws the same from the saved folder, which knows temperature, EOS and length, although
    the model came with other ends of text and other sampling."""
    model = make(name, 1, torch.float32, eos_token_id=5, pad_token_id=7, initializer_range=0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=[5, 6], do_sample=True, top_k=2, repetition_penalty=2.0
    )
    options = {"temperature": 0.8, "prompt_length": 4, "response_length": 8}
    policy, tokenizer = policy_of_main(model, monkeypatch, tmp_path, **options)
    ids, mask = sample(policy, tokenizer, [[3, 4]], 50)
    assert ids.shape == (50, 8) and EOS in ids and (ids[~mask] == EOS).all(), "ends at EOS"
    assert all((ids[:, 1:][ids[:, :-1] == token] != EOS).any() for token in (5, 6)), "and nowhere else"
    plain, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), torch.tensor([[3, 4]] * 50)
    torch.manual_seed(0)
    assert torch.equal(plain.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 2:], ids)


# ---------------------------------------------------------------------------------------------------- loading
def saved(model, folder, tensors=None, **config):
    """Saves the model, and then changes either the tensors or the config in the folder."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | (tensors or {})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(record))
    return str(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_load_in_float32_and_without_dropout(name, tmp_path):
    for kind, (auto, options) in enumerate(KINDS, 1):
        model = make(name, kind, torch.bfloat16, **options, pad_token_id=0)
        folder = saved(model, tmp_path / str(kind))
        found = p3o.load_model(auto, folder, words(), p3o.Args(device="cpu"), **options)
        assert type(found) is type(model) and found.dtype == torch.float32 and not found.training
        for a, b in zip(found.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b.float())


GPT2, SCORER, FEW = ("gpt2", 1), ("gpt2", 2), VOCAB - 1
BIAS, LORA = ({"tensors": {name: torch.ones(1)}} for name in ("score.bias", "transformer.h.0.lora_A"))
REFUSED = {  # name: (0 a policy, or 1 a reward model; what is made with the folder; a part of the line)
    "no score head": (1, GPT2, {}, "lacks the weights ['score.weight']"),
    "no lm head": (0, ("llama", 2), {}, "lacks the weights ['lm_head.weight']"),
    "a layer missing": (0, GPT2, {"n_layer": 3}, "lacks the weights ['transformer.h.2."),
    "a layer too many": (0, GPT2, {"n_layer": 1}, "holds ['transformer.h.1."),
    "reward model as policy": (0, SCORER, {}, "holds ['score.weight'], which would be ignored"),
    "a bias of the score": (1, SCORER, BIAS, "holds ['score.bias']"),
    "LoRA": (0, GPT2, LORA, "lora_A'], which would be ignored; "),
    "few embeddings": (0, (*GPT2, FEW), {}, f"has {FEW} embeddings, too few for token id {FEW}; resize"),
    "the same, reward": (1, (*SCORER, FEW), {}, f"has {FEW} embeddings, too few for token id {FEW}; resize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_half_read_are_refused(case, tmp_path):
    as_reward, (name, kind, *size), changes, line = REFUSED[case]
    config = {"vocab_size": size[0]} if size else {}
    model = make(name, kind, torch.float32, num_labels=1, pad_token_id=0, **config)
    folder = saved(model, tmp_path / "m", **changes)
    with pytest.raises(SystemExit) as stop:
        p3o.load_model(KINDS[as_reward][0], folder, words(), p3o.Args(device="cpu"), **KINDS[as_reward][1])
    assert stop.value.code.startswith(f"error: {folder} ") and line in stop.value.code, stop.value.code
    assert "; " in stop.value.code and "\n" not in stop.value.code


def test_what_may_be_left_over_and_what_may_not(tmp_path):
    """A reward model may carry the head of the language model that it began as. An adapter is not ignored."""
    scorer = make("llama", 2, torch.float32, num_labels=1, pad_token_id=0)
    folder = saved(scorer, tmp_path / "m", tensors={"lm_head.weight": torch.ones(VOCAB, 32)})
    args = p3o.Args(device="cpu")
    assert p3o.load_model(KINDS[1][0], folder, words(), args, num_labels=1)
    (tmp_path / "m/adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="adapter_config.json.*ignored; "):
        p3o.load_model(KINDS[1][0], folder, words(), args, num_labels=1)


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    folder = saved(make("gpt2", 1, torch.float32), tmp_path / "m")
    args = p3o.Args(device="cpu", prompt_length=32, response_length=32)
    assert p3o.load_model(KINDS[0][0], folder, words(), args), "just short enough"
    args.response_length = 33
    with pytest.raises(SystemExit, match="takes at most 64 tokens; lower --prompt_length"):
        p3o.load_model(KINDS[0][0], folder, words(), args)
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=VOCAB, hidden_size=8, n_head=2, n_layer=1)
    )
    folder = saved(bloom, tmp_path / "bloom")  # its positions have no end, and its config names none
    assert p3o.load_model(KINDS[0][0], folder, words(), args)
