"""ppo.py against oracles that share no code with it: loops over floats, numpy, differences, tiny models."""

import itertools
import json
import math
import random

import numpy
import pytest
import torch
from conftest import word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

import ppo
import toy

LENGTHS = [5, 1, 3, 2, 5, 1]


def draw(seed=0):
    """Float64 (logp_new, logp_old, advantages, mask), each (N, R), N responses of at most R tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(shape, generator=generator, dtype=torch.float64), mask


def with_garbage(x, mask):
    """x with nan, inf and -inf in turn outside the mask."""
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(x.numel())[: x.numel()].view(x.shape)
    return torch.where(mask, x, garbage.to(x.dtype))


def real(*tensors, mask):
    """The masked entries of each, as lists of equally many floats."""
    return [x[mask].tolist() for x in tensors]


def gradient_like_the_loop(loss, naive, x, mask):
    """The gradient of loss(x) with garbage behind the ends, once value and gradient are those of a naive loop."""
    leaf = with_garbage(x, mask).requires_grad_()
    found, slopes = loss(leaf), torch.zeros_like(x)
    for place in mask.nonzero().tolist():
        move = torch.zeros_like(x)
        move[tuple(place)] = 1e-6
        slopes[tuple(place)] = (naive(x + move) - naive(x - move)) / 2e-6
    gradient = torch.autograd.grad(found, leaf)[0]
    assert found.shape == () and found.item() == pytest.approx(naive(x), rel=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-8)
    return gradient


def test_token_rewards_against_naive_loop():
    old, ref, _, mask = draw()
    score = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ppo.token_rewards(score, with_garbage(old, mask), with_garbage(ref, mask), mask, beta=0.3)
    assert found.dtype == torch.float64
    for n, length in enumerate(LENGTHS):
        for t in range(max(LENGTHS)):
            expected = -0.3 * (old[n, t] - ref[n, t]).item() if t < length else 0.0
            expected += score[n].item() if t == length - 1 else 0.0
            assert found[n, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.7, 1.0)])
def test_gae_against_its_definition(gamma, lam):
    """A_t sums the discounted temporal-difference errors from t to the end, each computed anew."""
    reward, value, _, mask = draw(seed=2)
    value.requires_grad_()
    advantages, returns = ppo.gae(with_garbage(reward, mask), with_garbage(value, mask), mask, gamma, lam)
    assert not advantages.requires_grad and not returns.requires_grad
    for n, length in enumerate(LENGTHS):
        r, v = reward[n, :length].tolist(), value[n, :length].tolist() + [0.0]
        for t in range(max(LENGTHS)):
            later = range(t, length)
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in later)
            assert advantages[n, t].item() == pytest.approx(expected, abs=1e-12)
            target = expected + v[t] if t < length else 0.0
            assert returns[n, t].item() == pytest.approx(target, abs=1e-12)


def test_masked_mean_and_whitening_against_numpy():
    x, _, _, mask = draw(seed=4)
    dirty, values = with_garbage(x, mask), x[mask].numpy()
    assert ppo.masked_mean(dirty, mask).item() == pytest.approx(values.mean(), rel=1e-12)
    for shift_mean in (True, False):
        white = ppo.masked_whiten(dirty, mask, shift_mean)
        expected = (values - values.mean()) / values.std() + (0 if shift_mean else values.mean())
        assert white[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert (white[~mask] == 0).all()
    assert ppo.masked_whiten(torch.full_like(x, 0.7), mask).abs().max() < 1e-3


def naive_kl(new, old):
    return sum(math.exp(n - o) - 1 - (n - o) for n, o in zip(new, old, strict=True)) / len(new)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, math.inf])
def test_clip_loss_gradient_and_stats_against_naive_loop(clip_range):
    new, old, advantages, mask = draw()
    dirty = [with_garbage(x, mask) for x in (old, advantages)]

    def terms(x):
        """(unclipped, clipped) of each token."""
        for n, o, a in zip(*real(x, old, advantages, mask=mask)):
            yield math.exp(n - o) * a, min(max(math.exp(n - o), 1 - clip_range), 1 + clip_range) * a

    loss = lambda x: ppo.ppo_clip_loss(x, *dirty, mask, clip_range)  # noqa: E731
    naive = lambda x: -sum(map(min, terms(x))) / sum(LENGTHS)  # noqa: E731
    grad = gradient_like_the_loop(lambda x: loss(x)[0], naive, new, mask)
    clipped = sum(held < free for free, held in terms(new)) / sum(LENGTHS)
    expected = {"clip_fraction": clipped, "approx_kl": naive_kl(*real(new, old, mask=mask))}
    expected["log_ratio_max"] = (new - old)[mask].abs().max().item()
    assert loss(with_garbage(new, mask))[1] == pytest.approx(expected, rel=1e-6)
    assert 0 < clipped < 1 or clip_range == math.inf, "both sides of the clip must occur"
    rho = (new - old).exp()
    removed = ((rho > 1 + clip_range) & (advantages > 0)) | ((rho < 1 - clip_range) & (advantages < 0))
    assert torch.equal(grad == 0, removed | ~mask), "no gradient outside the mask nor where the clip acts"

    def penalized(x):
        return 0.7 * naive_kl(*real(x, old, mask=mask)) - sum(free for free, _ in terms(x)) / sum(LENGTHS)

    gradient_like_the_loop(lambda x: ppo.ppo_penalty_loss(x, *dirty, mask, 0.7)[0], penalized, new, mask)


@pytest.mark.parametrize("clip_range", [0.2, math.inf, None])
def test_value_loss_and_gradient_against_naive_loop(clip_range):
    new, old, returns, mask = draw(seed=6)
    dirty, limit = [with_garbage(x, mask) for x in (old, returns)], clip_range or math.inf

    def naive(x):
        lists = zip(*real(x, old, returns, mask=mask))
        errors = [((v - r) ** 2, (o + min(max(v - o, -limit), limit) - r) ** 2) for v, o, r in lists]
        return sum(map(max, errors)) / 2 / sum(LENGTHS)

    loss = lambda x: ppo.value_loss(x, *dirty, mask, clip_range)  # noqa: E731
    grad = gradient_like_the_loop(loss, naive, new, mask)
    assert (grad[mask] == 0).any() == (clip_range == 0.2) and (grad[mask] != 0).any()


@pytest.mark.parametrize("loss", [ppo.ppo_clip_loss, ppo.ppo_penalty_loss])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_extreme_ratios_leave_loss_and_gradient_finite(loss, shift):
    """log rho is clamped to +-20: the loss is that of 20, and the token gets no gradient."""
    new, old, advantages, mask = (x.float() if x.is_floating_point() else x for x in draw())
    far, held = new.clone(), new.clone()
    far[0, 2], held[0, 2] = old[0, 2] + shift, old[0, 2] + math.copysign(20, shift)
    found, exact = (loss(x, old, advantages, mask, 0.3)[0] for x in (far.requires_grad_(), held))
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    grad = torch.autograd.grad(found, far)[0]
    assert grad.isfinite().all() and grad[0, 2] == 0 and (grad[mask] != 0).any()


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_running_normalizer_against_numpy_over_everything_seen_also_after_resume(shift_mean, clip):
    generator = torch.Generator().manual_seed(0)
    batches = [5 + 3 * torch.randn(size, generator=generator) for size in (7, 1, 64, 32)]
    normalizer, seen = ppo.RunningNormalizer(shift_mean, clip=clip), []
    for x in batches:
        found, (seen, before) = normalizer(x.double()), (seen + x.tolist(), normalizer)
        everything = numpy.array(seen)
        expected = (numpy.array(x.tolist()) - (everything.mean() if shift_mean else 0)) / everything.std()
        expected = expected if clip is None else expected.clip(-clip, clip)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        normalizer = ppo.RunningNormalizer(shift_mean, clip=clip)
        normalizer.load_state_dict(json.loads(json.dumps(before.state_dict())))


def test_adaptive_beta_by_hand():
    """A horizon far below a rollout moves it by a fifth at most, and keeps it positive."""
    for kl, factor in ((6.0, 1), (6.6, 1 + 0.1 * 0.0128), (60.0, 1.00256), (0.0, 0.99744), (5.4, 0.99872)):
        assert ppo.adaptive_beta(0.1, kl, 6.0, 10000, 128) == pytest.approx(0.1 * factor, rel=1e-12)
    assert ppo.adaptive_beta(0.5, 0.0, target=1.0, horizon=1, n=128) == pytest.approx(0.4)


TINY = dict(vocab_size=11, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
TINY |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=1, pad_token_id=0)
SIZES = {"device": "cpu", "micro_batch_size": 4, "minibatch_size": 4}
TOKENIZER = word_tokenizer(11, pad=0)


def prepared(args):
    """A policy, a critic in float64 but for its head, both moved a little since the batch; the batch; its texts."""
    torch.manual_seed(0)
    kinds = AutoModelForCausalLM, AutoModelForSequenceClassification
    policy, critic = (kind.from_config(GPT2Config(**TINY, num_labels=1)).double().eval() for kind in kinds)
    critic.score.float()
    rng, generator = random.Random(0), torch.Generator().manual_seed(2)
    draw_ids = lambda n: [rng.randrange(2, 11) for _ in range(n)]  # noqa: E731
    texts = [(draw_ids(n), draw_ids(rng.randrange(8)) + [1]) for n in (3, 3, 1, 1, 6, 6, 2, 2)]
    batch = ppo.pad_rows(*zip(*texts), TOKENIZER, args)
    with torch.no_grad():
        more = {"logp_old_tok": ppo.response_logps(policy, **batch, temperature=args.temperature)}
        batch |= more | {"value_old_tok": ppo.read_values(critic, **batch)}
    for name in ("advantages", "returns"):
        batch[name] = torch.randn(batch["response_ids"].shape, generator=generator)
    for parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy, critic, batch, texts


DEMONSTRATIONS = [{"prompt_ids": [3] * n, "response_ids": [[5, 6, 7, 4, 2][:n] + [1]]} for n in (1, 2, 3, 5)]


def gradients_of_a_step(learns=True, **flags):
    """(gradient of the policy, of the critic) and metrics of an optimizer step."""
    args = ppo.Args(**SIZES | {"max_grad_norm": 1e9} | flags)
    *models, batch, _ = prepared(args)
    models[0].requires_grad_(learns)
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)  # its step shows the gradient
    flat = lambda: [torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models]  # noqa: E731
    before, order = flat(), torch.tensor([2, 0, 3, 1])
    torch.manual_seed(0)
    metrics = ppo.update_models(*models, optimizer, batch, order, DEMONSTRATIONS, TOKENIZER, args)
    assert all(p.grad is None for p in parameters), "the next step starts without gradients"
    return [(was - now) / 0.1 for was, now in zip(before, flat())], metrics


@pytest.mark.parametrize("value_clip_range, size", [(0.05, 1), (math.inf, 3)])
def test_step_gradient_is_that_of_the_formulas(value_clip_range, size):
    """The whole step, in micro-batches, with demonstrations, against autograd through loops over tokens."""
    flags = {"ptx_coef": 0.4, "temperature": 0.7, "value_clip_range": value_clip_range}
    found_both, metrics = gradients_of_a_step(**flags, micro_batch_size=size)
    policy, critic, batch, texts = prepared(ppo.Args(**SIZES | flags))
    torch.manual_seed(0)
    chosen = [DEMONSTRATIONS[i] for i in torch.randint(4, (4,))]
    surrogate = value_error = likelihood = 0.0
    table = lambda *ids: (policy(torch.tensor([sum(ids, [])])).logits[0] / 0.7).log_softmax(-1)  # noqa: E731
    for row, (prompt, response) in enumerate(texts):
        logps = table(prompt, response)
        hidden = critic.transformer(torch.tensor([prompt + response])).last_hidden_state
        value = critic.score(hidden.float())[0, :, 0]
        for t, token in enumerate(response):
            here = len(prompt) + t - 1
            rho = (logps[here, token] - batch["logp_old_tok"][row, t]).exp()
            a, old, target = (batch[name][row, t] for name in ("advantages", "value_old_tok", "returns"))
            surrogate = surrogate + torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)
            held = old + (value[here] - old).clamp(-value_clip_range, value_clip_range)
            value_error = value_error + torch.maximum((value[here] - target) ** 2, (held - target) ** 2) / 2
    for row in chosen:
        prompt, (response,) = row["prompt_ids"], row["response_ids"]
        likelihood += table(prompt, response)[len(prompt) - 1 : -1][range(len(response)), response].sum()
    tokens, demonstrated = sum(len(y) for _, y in texts), sum(len(row["response_ids"][0]) for row in chosen)
    ((value_error - surrogate) / tokens - 0.4 * likelihood / demonstrated).backward()
    for model, found in zip((policy, critic), found_both, strict=True):
        exact = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
    expected = [-surrogate / tokens, value_error / tokens, likelihood / demonstrated]
    found = [metrics[name] for name in ("loss", "value_loss", "ptx_logp")]
    assert found == pytest.approx([value.item() for value in expected], rel=1e-4)


def test_gradients_are_clipped_for_each_model_and_a_policy_that_does_not_learn_gets_none():
    seen, clipped = gradients_of_a_step(max_grad_norm=0.01)
    assert [x.norm().item() for x in seen] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert clipped["grad_norm"] > 0.02 and clipped["critic_grad_norm"] > 0.02
    (policy, critic), metrics = gradients_of_a_step(ptx_coef=0.4, learns=False)
    (_, expected), others = gradients_of_a_step(ptx_coef=0.4)
    assert (policy == 0).all() and torch.equal(critic, expected)
    assert metrics == pytest.approx(others | {"grad_norm": 0.0}, rel=1e-6)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random models over the toy's words, and a few of its rows: what the stages before PPO would leave."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, config = toy.make_model()
    config.n_layer, config.n_embd, config.n_head, config.num_labels = 1, 32, 2, 1
    torch.manual_seed(0)
    for name, kind in (("sft", AutoModelForCausalLM), ("reward_model", AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = itertools.product(toy.PLACES, toy.ASPECTS)
    requests = [(f"write about the {place} and its {aspect} .", place, aspect) for place, aspect in pairs]
    for name, kind in (("prompts", "prompts"), ("demonstrations", "sft")):
        rows = "".join(json.dumps(row) + "\n" for row in toy.make_rows(kind, requests, 12, random.Random(0)))
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.jsonl").write_text(rows)
    return folder


SMALL = ["--device", "cpu", "--minibatch_size", 2, "--prompts_per_step", 4, "--prompt_length", 12]
SMALL += ["--response_length", 6, "--eval_prompts", 4, "--eval_every", 100]
PATHS = dict(model="sft", reward_model="reward_model", dataset="prompts", ptx_dataset="demonstrations")


def run(world, folder, *flags, steps=1):
    """ppo.main on the tiny world as the command line would call it. Returns the rows of metrics.jsonl."""
    words = [f"--{name}={world / value}" for name, value in PATHS.items()]
    words += [*SMALL, "--output_dir", folder, "--steps", steps, *flags]
    ppo.main(ppo.parse_args([str(word) for word in words]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def plain_run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(world, folder, steps=2)


EVALUATED = "reward kl entropy response_length eos_rate".split()
TIMELESS = (
    "loss clip_fraction log_ratio_max grad_norm critic_grad_norm value_loss explained_variance approx_kl"
)
TIMELESS = {*EVALUATED, *TIMELESS.split(), "beta"}


def test_metrics_and_files_of_a_run(world, plain_run):
    folder, rows = plain_run
    evaluated = {"step", "eval_gain", *(f"eval_{name}" for name in EVALUATED)}
    trained = TIMELESS | {"seconds"}
    assert [set(row) for row in rows] == [evaluated, trained | {"step"}, trained | evaluated]
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-4) and abs(rows[2]["kl"]) > 1e-4
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for model, name in ((AutoModelForCausalLM.from_pretrained(folder), "model"), (critic, "critic")):
        assert all(torch.equal(value, saved[name][key]) for key, value in model.state_dict().items())
    rates = [group["lr"] for group in saved["optimizer"]["param_groups"]]
    assert rates == [ppo.Args.learning_rate / 2, ppo.Args.critic_learning_rate / 2], "step 2 of 2"


def test_advantages_returns_and_their_metrics(world, tmp_path, monkeypatch):
    """As the updates get them, of values read without padding. Returns and metrics are those before whitening."""
    batches, flags = [], ["--micro_batch_size", 1, "--gamma", 0.9, "--lam", 0.5]
    keep = lambda *args: batches.append(args[3]) or {"log_ratio_max": 0.0}  # noqa: E731
    monkeypatch.setattr(ppo, "update_models", keep)
    row = run(world, tmp_path / "plain", *flags, "--whiten_advantages", "false")[1]
    white_row = run(world, tmp_path / "white", *flags)[1]
    batch, white = batches[0], batches[-1]
    critic = AutoModelForSequenceClassification.from_pretrained(world / "reward_model").eval()
    mask = batch["response_mask"]
    value = torch.zeros(mask.shape, dtype=torch.float64)
    for n, t in mask.nonzero().tolist():
        ids = [*batch["prompt_ids"][n][batch["prompt_mask"][n]], *batch["response_ids"][n, :t]]
        with torch.no_grad():
            value[n, t] = critic(torch.tensor([ids])).logits.item()
    reward = ppo.token_rewards(batch["score"], batch["logp_old_tok"], batch["logp_ref_tok"], mask, 0.5)
    advantages, returns = (x[mask] for x in ppo.gae(reward, value, mask, 0.9, 0.5))
    assert batch["advantages"][mask].tolist() == pytest.approx(advantages.tolist(), abs=1e-5)
    assert batch["returns"][mask].tolist() == pytest.approx(returns.tolist(), abs=1e-5)
    to_come = ppo.gae(reward, value, mask, 0.9, 1.0)[1][mask].numpy()  # Monte-Carlo returns
    explained = 1 - numpy.var(to_come - value[mask].numpy()) / numpy.var(to_come)
    assert row["explained_variance"] == pytest.approx(explained, abs=1e-4)
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    assert white["advantages"][mask].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert torch.equal(white["returns"], batch["returns"])
    assert all(white_row[name] == row[name] for name in TIMELESS & set(row))


FLAGS = """--policy_loss penalty --penalty_coef 50, --lam 0, --clip_range 0.001, --value_clip_range 0.001
--normalize_reward true, --scale_reward, --reward_clip 0.01, --critic_init sft, --dtype bfloat16 --ptx_coef 0.1
--epochs 1 --num_responses 1 --micro_batch_size 1 --beta 0, --advantage_clip 0.01, --reward_shift 5
--missing_eos_penalty 5 --temperature 0.5 --minibatch_size 4"""  # the others have tests of their own


@pytest.mark.parametrize("flags", FLAGS.replace("\n", ", ").split(", "))
def test_every_flag_runs_and_changes_the_run(world, plain_run, tmp_path, flags):
    """Step 1 of 1 does what step 1 of 2 does: the learning rate of a run's first step is the highest."""
    rows = run(world, tmp_path / "run", *flags.split())
    assert any(rows[1].get(name) != plain_run[1][1][name] for name in TIMELESS)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "--reward_shift" not in flags or rows[1]["reward"] == plain_run[1][1]["reward"], "not reported"


def test_adaptive_beta_moves_by_the_kl_of_each_rollout_after_the_critics_first_steps(world, tmp_path):
    """Until then the policy does not move, and its KL of 0 says nothing."""
    flags = "--beta", 0.2, "--kl_target", 0.001, "--kl_horizon", 8, "--learning_rate", 0.01, "--ptx_coef", 0.1
    rows = run(world, tmp_path / "run", *flags, "--critic_warmup_steps", 1, steps=4)
    assert rows[1]["kl"] == rows[2]["kl"] == 0 == rows[1]["grad_norm"] < rows[2]["grad_norm"]
    assert rows[1]["ptx_logp"] < 0 < rows[1]["critic_grad_norm"]
    assert rows[2]["value_loss"] != rows[1]["value_loss"] and rows[3]["kl"] != 0
    assert rows[1]["beta"] == rows[2]["beta"] == 0.2 != rows[3]["beta"]
    for row, later in zip(rows[2:], rows[3:]):
        step = min(max(row["kl"] / 0.001 - 1, -0.2), 0.2)  # the horizon is the 8 responses of one step
        assert later["beta"] == pytest.approx(row["beta"] * (1 + step), rel=1e-12)
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["beta"]
    assert saved == ppo.adaptive_beta(rows[4]["beta"], rows[4]["kl"], 0.001, 8, 8)


def test_presets_set_defaults_and_a_flag_that_is_given_wins():
    """On either side of --preset, and also where its value is the default without the preset."""
    plain, chosen = ppo.Args(), {"preset": "ppo_max", **ppo.PRESETS["ppo_max"]}
    assert ppo.parse_args([]) == ppo.parse_args(["--preset", "ppo"]) == plain
    for name in ppo.PRESETS["ppo_max"]:
        value = math.inf if name == "reward_clip" else getattr(plain, name)
        given = [f"--{name}", str(value)]
        for words in (["--preset", "ppo_max", "=".join(given)], [*given, "--preset=ppo_max"]):
            assert ppo.parse_args(words) == ppo.Args(**chosen | {name: value}) != ppo.Args(**chosen)


WRONG = {
    "--gamma 1.5": "--gamma and --lam must be at most 1",
    "--minibatch_size 3": "--minibatch_size must divide --prompts_per_step",
    "--ptx_coef 1 --ptx_dataset prompts": "prompts has no columns",
    "--critic_init sft --reward_model sft": "sft lacks the weights ['score.weight']",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_refused_before_anything_is_written(world, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", *flags.split())
    assert stop.value.code.startswith(f"error: {WRONG[flags]}") and "\n" not in stop.value.code
    assert not (tmp_path / "run").exists()
