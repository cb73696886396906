"""dpo.py against loops over floats, differences, the optimum in closed form and one forward pass per response."""

import itertools
import json
import math

import pytest
import torch
from conftest import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser

import dpo

BETA = 0.5


def draw(B=12):
    """Random (logp_chosen, logp_rejected, ref_chosen, ref_rejected), each (B,), a few nats apart."""
    generator = torch.Generator().manual_seed(0)
    ref = -5 - 10 * torch.rand(2, B, generator=generator, dtype=torch.float64)
    return [*(ref + 3 * torch.randn(2, B, generator=generator, dtype=torch.float64)), *ref]


def naive_loss(logps, beta):
    """Mean of -log(1 / (1 + exp(-beta * difference of log ratios))) over lists of floats."""
    margins = [beta * ((w - ref_w) - (y - ref_y)) for w, y, ref_w, ref_y in zip(*logps, strict=True)]
    return sum(-math.log(1 / (1 + math.exp(-m))) for m in margins) / len(margins)


def loss_and_grads(logps, beta=BETA):
    """The loss, and its gradients in the policy's log-probs of the chosen and the rejected responses."""
    leaves = [x.detach().clone().requires_grad_() for x in logps[:2]]
    loss, _ = dpo.dpo_loss(*leaves, *logps[2:], beta)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_loss_and_gradient_against_naive_loops(beta):
    logps = torch.stack(draw())
    loss, *grads = loss_and_grads(logps, beta)
    assert loss.shape == () and loss.item() == pytest.approx(naive_loss(logps.tolist(), beta), rel=1e-12)
    for side, b in itertools.product(range(2), range(12)):
        move = torch.zeros_like(logps)
        move[side, b] = 1e-5
        up, down = (naive_loss((logps + sign * move).tolist(), beta) for sign in (1, -1))
        assert grads[side][b].item() == pytest.approx((up - down) / 2e-5, abs=1e-9)
    w, y, ref_w, ref_y = logps.tolist()
    margins = [beta * (a - b - c + d) for a, b, c, d in zip(w, ref_w, y, ref_y)]
    expected = {"accuracy": sum(m > 0 for m in margins) / 12, "margin": sum(margins) / 12}
    expected |= {"logp_chosen": sum(w) / 12, "logp_rejected": sum(y) / 12}
    assert dpo.dpo_loss(*logps, beta)[1] == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["accuracy"] < 1, "both kinds of pairs must occur"


@pytest.mark.parametrize("scale", [1, 100])
def test_an_offset_per_prompt_changes_no_bit(scale):
    """log pi or log pi_SFT + delta(x) on both responses; multiples of 1/8 add without rounding in float32."""
    generator = torch.Generator().manual_seed(1)
    logps = list(torch.randint(-800, 0, (4, 4096), generator=generator) / 8)
    delta = torch.randint(-8 * scale, 8 * scale, (2, 4096), generator=generator) / 8
    shifted = [logps[0] + delta[0], logps[1] + delta[0], logps[2] + delta[1], logps[3] + delta[1]]
    for plain, moved in zip(loss_and_grads(logps, 0.25), loss_and_grads(shifted, 0.25), strict=True):
        assert torch.equal(plain, moved)


@pytest.mark.parametrize("ratio, expected, slope", [(1e4, 0, 0), (-1e4, 1e4, -1), (0, math.log(2), -0.5)])
def test_extreme_ratios_stay_finite_and_the_reference_has_no_opinion(ratio, expected, slope):
    ref = torch.full((2,), -1e4)
    logps = [ref + ratio / 2, ref - ratio / 2, ref, ref]
    loss, *grads = loss_and_grads(logps, beta=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.cat(grads).tolist() == pytest.approx([slope / 2] * 2 + [-slope / 2] * 2, rel=1e-6)
    stats = dpo.dpo_loss(*logps, 1.0)[1]
    assert (stats["accuracy"], stats["margin"]) == ((ratio > 0) / 2 + (ratio >= 0) / 2, ratio)


@pytest.mark.parametrize("place", range(4))
def test_shapes_that_would_broadcast_are_refused(place):
    logps = draw(B=4)
    logps[place] = logps[place][:, None]
    with pytest.raises(ValueError, match="shape"):
        dpo.dpo_loss(*logps, BETA)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_population_loss_is_least_at_the_gibbs_optimum(beta):
    """All pairs of 8 responses, Bradley-Terry labels from a reward r: least at pi_ref exp(r / beta) / Z."""
    generator = torch.Generator().manual_seed(3)
    reward = torch.randn(8, generator=generator, dtype=torch.float64)
    logp_ref = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(-1)
    chosen, rejected = torch.tensor(list(itertools.permutations(range(8), 2))).T
    prevalence = 1 / (1 + torch.exp(reward[rejected] - reward[chosen]))  # how often this one is chosen
    logits = logp_ref.clone().requires_grad_()
    for _ in range(300):
        logp = logits.log_softmax(-1)
        _, *grads = loss_and_grads([logp[chosen], logp[rejected], logp_ref[chosen], logp_ref[rejected]], beta)
        surrogate = sum((prevalence * g * logp[side]).sum() for g, side in zip(grads, (chosen, rejected)))
        gradient = torch.autograd.grad(surrogate, logits)[0]
        logits = (logits - 25 / beta**2 * gradient).detach().requires_grad_()
    assert gradient.abs().max() < 1e-10, "not converged"
    optimum = (logp_ref + reward / beta).log_softmax(-1)
    assert (optimum - logp_ref).abs().max() > 0.5, "the optimum must lie away from the reference"
    torch.testing.assert_close(logits.detach().log_softmax(-1), optimum, rtol=0, atol=1e-8)


TOKENIZER = word_tokenizer(20)


def small_model(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def random_examples(B):
    """Preference pairs of random tokens, of all lengths."""
    torch.manual_seed(0)
    tokens = [torch.randint(0, 20, (n,)).tolist() for n in torch.randint(2, 9, (3 * B,))]
    return [{"prompt_ids": tokens[b], "response_ids": tokens[B + b :: B]} for b in range(B)]


def batch_args(micro_batch_size, **more):
    more = {"temperature": 0.7, "beta": BETA, "max_grad_norm": 1e9} | more
    return dpo.Args(device="cpu", micro_batch_size=micro_batch_size, **more)


def lone_logp(model, prompt, response, temperature):
    """log pi(y|x) from a forward pass of this one text, unpadded, token by token."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    steps = range(len(prompt), len(prompt) + len(response))
    return sum((logits[t - 1] / temperature).log_softmax(-1)[(prompt + response)[t]] for t in steps)


def naive_ratios(policy, reference, examples, args):
    """[log ratio of the chosen, of the rejected] for each pair, one text at a time."""
    texts = [[(e["prompt_ids"], y, args.temperature) for y in e["response_ids"]] for e in examples]
    return [[lone_logp(policy, *x) - lone_logp(reference, *x).detach() for x in pair] for pair in texts]


@pytest.mark.parametrize("micro_batch_size, max_norm", [(1, 1e9), (2, 1e9), (4, 0.01), (5, 1e9)])
def test_micro_batches_add_up_to_the_gradient_of_the_pairs(micro_batch_size, max_norm):
    """Of 5 pairs, so that 4 leave a short last batch. The norm is clipped."""
    policy, reference, examples = small_model(1), small_model(2), random_examples(8)
    args, pairs = batch_args(micro_batch_size, max_grad_norm=max_norm), torch.tensor([6, 1, 7, 0, 3])
    batch = dpo.read_pairs(reference, examples, TOKENIZER, batch_args(2))
    ratios = naive_ratios(policy, reference, [examples[p] for p in pairs], args)
    loss = sum(torch.log1p(torch.exp(-BETA * (w - y))) for w, y in ratios) / 5
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)  # its step shows the gradient
    metrics = dpo.update_on_pairs(policy, optimizer, batch, pairs, args)
    moved, norm = before - torch.nn.utils.parameters_to_vector(policy.parameters()), expected.norm().item()
    torch.testing.assert_close(moved / 0.1, expected * min(1, max_norm / norm), rtol=1e-4, atol=2e-5)
    assert [metrics["loss"], metrics["grad_norm"]] == pytest.approx([loss.item(), norm], rel=1e-4)
    assert norm > 0.1 and all(p.grad is None for p in policy.parameters()), "gradient left over"


def test_held_out_metrics_are_means_over_all_pairs(monkeypatch):
    """And without a reward model the KL is one over fresh responses. 40 prompts: chunks of unequal size."""
    policy, reference, sampled, sample_batch = small_model(1), small_model(2), [], dpo.sample_batch
    rows, args = [{"prompt": "", **row} for row in random_examples(40)], batch_args(3, reward_model="none")
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 6}
    policy.generation_config.update(**sampling, eos_token_id=1, pad_token_id=1)
    monkeypatch.setattr(dpo, "sample_batch", lambda *a: sampled.append(sample_batch(*a)) or sampled[-1])
    metrics = dpo.evaluate_preferences(0, policy, reference, rows, TOKENIZER, args)
    margins = [BETA * (w - y).item() for w, y in naive_ratios(policy, reference, rows, args)]
    fresh = []
    for batch in sampled:
        for x, x_mask, y, y_mask in zip(*dpo.token_rows(batch, slice(None)).values()):
            fresh.append({"prompt_ids": x[x_mask].tolist(), "response_ids": [y[y_mask].tolist()]})
    kl = sum(ratio.item() for (ratio,) in naive_ratios(policy, reference, fresh, args)) / 40
    expected = {"eval_loss": sum(math.log1p(math.exp(-m)) for m in margins) / 40, "eval_kl": kl}
    expected |= {"eval_accuracy": sum(m > 0 for m in margins) / 40, "eval_margin": sum(margins) / 40}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(fresh) == 40 and abs(kl) > 0.1 and "eval_reward" not in metrics


def order_of(score, **options):
    """The numbers of the rows after ranking. They must be the same in every tensor."""
    rows, names = torch.arange(len(score)), "prompt_ids prompt_mask response_ids response_mask logp_ref_tok"
    batch = {"score": score, "ended": rows > 0} | {name: rows[:, None] for name in names.split()}
    ranked = dpo.rank_pairs(batch, **options)
    (order,) = {tuple(ranked[name].flatten().tolist()) for name in names.split()}
    return order


def test_the_order_of_the_labels():
    """Ranked: ties keep their order. Sampled: Bradley-Terry, at odds of 1, 3 and 1/9, 10000 pairs each."""
    score = torch.tensor([1.0, 2.0, 5.0, -1.0, 3.0, 3.0, 1e9, 1e9 + 0.5], dtype=torch.float64)
    assert order_of(score) == (1, 0, 2, 3, 4, 5, 7, 6)
    pairs = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [7.0, 7.0 + math.log(9)]], dtype=torch.float64)
    torch.manual_seed(0)
    order = torch.tensor(order_of(pairs.repeat(10000, 1).flatten(), labels="sampled"))
    chosen, rejected = order.view(-1, 2).unbind(1)
    assert torch.equal(chosen // 2, torch.arange(30000)) and torch.equal(chosen ^ 1, rejected)
    first_won = (chosen % 2 == 0).view(10000, 3).double().mean(0)
    assert first_won.tolist() == pytest.approx([1 / 2, 3 / 4, 1 / 10], abs=4 * 0.5 / 100)


SMALL = ["--minibatch_size", 8, "--micro_batch_size", 4, "--eval_prompts", 12, "--save_every", 2]
ONLINE = ["--online", "--prompts_per_step", 8, "--rollout_epochs", 1]


def train(chain, folder, monkeypatch, *flags):
    """dpo.py's main in this process, on the command line `flags`. Returns metrics.jsonl as a list."""
    monkeypatch.chdir(chain)
    torch.seed()  # a run must not depend on the random state that it finds
    flags = [str(flag) for flag in (*SMALL, "--output_dir", folder, *flags)]
    dpo.main(HfArgumentParser(dpo.Args).parse_args_into_dataclasses(flags)[0])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flags_of(mode, chain, tmp_path):
    """With the first rows of the toy preferences: reading all takes longer than the training."""
    (tmp_path / "preferences").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        rows = (chain / "data/toy/preferences" / name).read_text().splitlines()[:40]
        (tmp_path / "preferences" / name).write_text("\n".join(rows))
    return ["--dataset", tmp_path / "preferences", *(ONLINE if mode == "online" else [])]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_keeps_its_promises_and_resumes_bit_for_bit(mode, chain, tmp_path, monkeypatch, capsys):
    flags = [*flags_of(mode, chain, tmp_path), "--eval_every", 2, "--learning_rate", 1e-3, "--steps", 4]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    rows = train(chain, straight, monkeypatch, *flags)
    gain = rows[4]["eval_reward"] - rows[0]["eval_reward"]
    assert f"{straight}, step 4: gain {gain:.2f} over" in capsys.readouterr().out
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4] and len(rows) == 5
    assert ("frac_identical_pairs" in rows[1]) == (mode == "online") != ("eval_loss" in rows[0])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    start = rows[1]["loss"], rows[1]["margin"], rows[0]["eval_kl"]  # at the reference
    assert start == pytest.approx((math.log(2), 0, 0), abs=1e-5)
    assert abs(rows[2]["margin"]) > 1e-3 and abs(rows[4]["eval_kl"]) > 1e-3, "the reference stays behind"
    step_of_dpo = dpo.dpo_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dpo, "dpo_step", lambda step, *a: step_of_dpo(step, *a) if step < 4 else 1 / 0)
        train(chain, halves, patch, *flags)  # step 3 is done and logged, and the checkpoint is of step 2
    resumed = train(chain, halves, monkeypatch, "--resume", *flags)
    assert (halves / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert (halves / "samples_4.jsonl").read_bytes() == (straight / "samples_4.jsonl").read_bytes()
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in resumed]


def test_online_learns_from_the_order_of_the_scores_alone(chain, tmp_path, monkeypatch):
    """Scores of three times the size give the same weights; negated ones and winners that are drawn give others."""
    read_score, weights, flags = dpo.read_score, [], flags_of("online", chain, tmp_path)
    for slope, labels in ((1, "ranked"), (3, "ranked"), (-1, "ranked"), (1, "sampled")):
        scale = lambda *a, slope=slope, **batch: slope * read_score(*a, **batch)  # noqa: E731
        monkeypatch.setattr(dpo, "read_score", scale)
        folder, more = tmp_path / f"{labels}{slope}", ["--missing_eos_penalty", 0, "--labels", labels]
        train(chain, folder, monkeypatch, *flags, "--steps", 1, *more)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] and len(set(weights)) == 3


def test_offline_the_reward_model_only_evaluates(chain, tmp_path, monkeypatch, capsys):
    flags = [*flags_of("offline", chain, tmp_path), "--epochs", 2, "--minibatch_size", 16]  # 40 rows
    train(chain, tmp_path / "with", monkeypatch, *flags)
    rows = train(chain, tmp_path / "without", monkeypatch, *flags, "--reward_model", "none")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1] and rows[-1]["step"] == 5
    assert not any("reward" in name or "gain" in name for row in rows for name in row)
    assert capsys.readouterr().out.endswith(f" and KL {rows[-1]['eval_kl']:.2f} nats/response\n")


WRONG = {
    "--dataset data/toy/prompts": "data/toy/prompts has no columns",
    "--online --minibatch_size 5": "--minibatch_size must divide --prompts_per_step",
    "--online --reward_model none": "--online ranks by reward",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_refused_before_anything_is_written(flags, chain, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"^error: {WRONG[flags]}"):
        train(chain, tmp_path / "run", monkeypatch, *flags.split())
    assert not (tmp_path / "run").exists()
