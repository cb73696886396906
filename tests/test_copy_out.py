"""The promised functions can be copied into other projects: each has the promised signature, and gives the same results
if it is taken out of its file and run where there is nothing but torch and math.

To promise another function, add a line to PROMISED.
"""

import importlib
import inspect
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

B, K, R, P, N = 6, 4, 5, 3, 40
draw = torch.randn
mask = torch.arange(R) < torch.tensor([[5], [1], [2], [5], [3], [4]])  # (B, R), padded on the right


def tokens():
    """Arguments of response_logps."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    config.eos_token_id = config.bos_token_id = 0
    prompt_mask = (torch.arange(P) < torch.randint(1, P + 1, (B, 1))).flip(1)
    ids = torch.randint(9, (B, P)), torch.randint(9, (B, R))
    return GPT2LMHeadModel(config).eval(), ids[0], prompt_mask, ids[1], mask, 0.7


def normalized(normalizer_class):
    """What a RunningNormalizer makes of numbers, and of other numbers after a restart."""
    one, other = normalizer_class(clip=1.0), normalizer_class(shift_mean=False)
    results = [one(draw(B)), other(draw(B)), one(3 * draw(B) + 1)]
    other.load_state_dict(one.state_dict())
    return [*results, other(draw(B)), other.state_dict()]


RATIO = ["masked_mean", "importance_ratio"]
LOGPS = "(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0)"
LOGPS = LOGPS, ["model_inputs"], [tokens]
PROMISED = {  # script.function: signature, what comes along out of the same file, arguments to try it with
    "sft.completion_loss": (
        "(logits, tokens, completion_mask)",
        [],
        [lambda: (draw(B, R, 7), torch.randint(7, (B, R)), mask)],
    ),
    "reward_model.bradley_terry_loss": (
        "(reward_chosen, reward_rejected, margin=0.0)",
        [],
        [lambda: (draw(B), draw(B)), lambda: (draw(B), draw(B), 0.3)],
    ),
    "p3o.trajectory_reward": (
        "(score, logp_old_seq, logp_ref_seq, beta)",
        [],
        [lambda: (draw(B, K), draw(B, K), draw(B, K), 0.3)],
    ),
    "p3o.pairwise_policy_gradient_loss": ("(logp_new_seq, reward)", [], [lambda: (draw(B, K), draw(B, K))]),
    "p3o.p3o_loss": (
        "(logp_new_seq, logp_old_seq, reward, clip_range=0.2, clipping='joint', max_importance_weight=None)",
        [],
        [
            lambda: (draw(B, K), draw(B, K), draw(B, K)),
            lambda: (draw(B, K), draw(B, K), draw(B, K), 0.1, "separate"),
            lambda: (draw(B, K), draw(B, K), draw(B, K), 0.3, "joint", 1.5),
        ],
    ),
    "p3o.response_logps": LOGPS,
    "ppo.response_logps": LOGPS,
    "dpo.response_logps": LOGPS,
    "ppo.masked_mean": ("(x, mask)", [], [lambda: (draw(B, R), mask)]),
    "ppo.masked_whiten": (
        "(x, mask, shift_mean=True)",
        ["masked_mean"],
        [lambda: (draw(B, R), mask), lambda: (draw(B, R), mask, False)],
    ),
    "ppo.token_rewards": (
        "(score, logp_old_tok, logp_ref_tok, response_mask, beta)",
        [],
        [lambda: (draw(B), draw(B, R), draw(B, R), mask, 0.3)],
    ),
    "ppo.gae": (
        "(reward_tok, value_tok, response_mask, gamma=1.0, lam=0.95)",
        [],
        [lambda: (draw(B, R), draw(B, R), mask), lambda: (draw(B, R), draw(B, R), mask, 0.9, 0.5)],
    ),
    "ppo.ppo_clip_loss": (
        "(logp_new_tok, logp_old_tok, advantages, response_mask, clip_range=0.2)",
        RATIO,
        [lambda: (draw(B, R), draw(B, R), draw(B, R), mask)],
    ),
    "ppo.ppo_penalty_loss": (
        "(logp_new_tok, logp_old_tok, advantages, response_mask, penalty)",
        RATIO,
        [lambda: (draw(B, R), draw(B, R), draw(B, R), mask, 0.3)],
    ),
    "ppo.value_loss": (
        "(value_new_tok, value_old_tok, returns, response_mask, clip_range=0.2)",
        ["masked_mean"],
        [lambda: (draw(B, R), draw(B, R), draw(B, R), mask, c) for c in (0.2, None)],
    ),
    "ppo.RunningNormalizer": ("(shift_mean=True, scale=True, clip=None)", [], [normalized]),
    "ppo.adaptive_beta": ("(beta, kl, target, horizon, n)", [], [lambda: (0.3, 2.0, 1.5, 100, 8)]),
    "dpo.dpo_loss": (
        "(logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq, beta)",
        [],
        [lambda: (draw(B), draw(B), draw(B), draw(B), 0.3)],
    ),
    "frontier.gibbs_frontier": (
        "(reward, betas, log_ratio=None, gold=None)",
        [],
        [
            lambda: (draw(B, N), [0.1, 1.0]),
            lambda: (draw(B, N), [0.5], draw(B, N), draw(B, N)),
        ],
    ),
    "frontier.best_of_n_kl": ("(n)", [], [lambda: (7,)]),
    "frontier.win_rate": ("(score_a, score_b)", [], [lambda: (draw(N).round(), draw(N).round())]),
}
EACH = pytest.mark.parametrize("name", PROMISED)


def taken_out(name, along):
    """The function, with what comes along, as somebody who copied it would have it."""
    script, function = name.split(".")
    namespace = {"torch": torch, "math": math}
    for part in (*along, function):
        exec(inspect.getsource(getattr(importlib.import_module(script), part)), namespace)
    return namespace[function]


def tried(function, arguments):
    """Its results, and the gradient with respect to the first argument if there is one."""
    torch.manual_seed(1)
    if arguments is normalized:
        return normalized(function)
    values = list(arguments())
    if isinstance(values[0], torch.Tensor):
        values[0].requires_grad_()
    results = function(*values)
    loss = results[0] if isinstance(results, tuple) else results
    if getattr(loss, "requires_grad", False):
        loss.sum().backward()
        results = results, values[0].grad if isinstance(values[0], torch.Tensor) else None
    return results


def assert_same(one, other):
    """Nested values that are equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        assert len(one) == len(other) and (not isinstance(one, dict) or one.keys() == other.keys())
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key])
    else:
        assert one == other


@EACH
def test_a_copy_gives_the_same_results(name):
    script, function = name.split(".")
    signature, along, cases = PROMISED[name]
    copy, original = taken_out(name, along), getattr(importlib.import_module(script), function)
    for arguments in cases:
        results = tried(copy, arguments)
        assert_same(results, tried(original, arguments))
    for i, part in enumerate(along):  # nothing comes along in vain
        with pytest.raises(NameError):
            tried(taken_out(name, along[:i] + along[i + 1 :]), cases[0])


@EACH
def test_signatures(name):
    script, function = name.split(".")
    promised = getattr(importlib.import_module(script), function)
    assert str(inspect.signature(promised)) == PROMISED[name][0]
    assert inspect.getdoc(promised)


def test_float32_whatever_the_dtype_of_the_model():
    """This promise of response_logps is not in its signature."""
    model, *arguments = tokens()
    function = taken_out("p3o.response_logps", LOGPS[1])
    logps = function(model.to(torch.bfloat16), *arguments)
    assert logps.dtype == torch.float32 and logps.requires_grad and logps.shape == (B, R)
    assert torch.equal(logps == 0, ~mask)
