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


def some(count, *shape, then=()):
    """Makes arguments: so many random tensors of this shape, and then the others."""
    return lambda: (*(draw(shape) for _ in range(count)), *then)


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


MEAN, RATIO = ["masked_mean"], ["masked_mean", "importance_ratio"]
LOGPS = "(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0)"
PAIR, IDS = "reward_chosen, reward_rejected", [mask.long()]
CLIP = "(logp_new_tok, logp_old_tok, advantages, response_mask"
PROMISED = {  # script.function: signature, what comes along out of the same file, arguments to try it with
    "sft.completion_loss": ("(logits, tokens, completion_mask)", [], [some(1, B, R, 7, then=[*IDS, mask])]),
    "reward_model.bradley_terry_loss": (f"({PAIR}, margin=0.0)", [], [some(2, B), some(2, B, then=[0.3])]),
    "p3o.trajectory_reward": ("(score, logp_old_seq, logp_ref_seq, beta)", [], [some(3, B, K, then=[0.3])]),
    "p3o.pairwise_policy_gradient_loss": ("(logp_new_seq, reward)", [], [some(2, B, K)]),
    "p3o.p3o_loss": (
        "(logp_new_seq, logp_old_seq, reward, clip_range=0.2, clipping='joint', max_importance_weight=None)",
        *([], [some(3, B, K, then=then) for then in ([], [0.1, "separate"], [0.3, "joint", 1.5])]),
    ),
    **{f"{script}.response_logps": (LOGPS, ["model_inputs"], [tokens]) for script in ("p3o", "ppo", "dpo")},
    "ppo.masked_mean": ("(x, mask)", [], [some(1, B, R, then=[mask])]),
    "ppo.masked_whiten": (
        "(x, mask, shift_mean=True)",
        MEAN,
        [some(1, B, R, then=[mask, x]) for x in (0, 1)],
    ),
    "ppo.token_rewards": (
        "(score, logp_old_tok, logp_ref_tok, response_mask, beta)",
        *([], [lambda: (draw(B), draw(B, R), draw(B, R), mask, 0.3)]),
    ),
    "ppo.gae": (
        "(reward_tok, value_tok, response_mask, gamma=1.0, lam=0.95)",
        *([], [some(2, B, R, then=[mask]), some(2, B, R, then=[mask, 0.9, 0.5])]),
    ),
    "ppo.ppo_clip_loss": (f"{CLIP}, clip_range=0.2)", RATIO, [some(3, B, R, then=[mask])]),
    "ppo.ppo_penalty_loss": (f"{CLIP}, penalty)", RATIO, [some(3, B, R, then=[mask, 0.3])]),
    "ppo.value_loss": (
        "(value_new_tok, value_old_tok, returns, response_mask, clip_range=0.2)",
        *(MEAN, [some(3, B, R, then=[mask, clip_range]) for clip_range in (0.2, None)]),
    ),
    "ppo.RunningNormalizer": ("(shift_mean=True, scale=True, clip=None)", [], [normalized]),
    "ppo.adaptive_beta": ("(beta, kl, target, horizon, n)", [], [lambda: (0.3, 2.0, 1.5, 100, 8)]),
    "dpo.dpo_loss": (
        "(logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq, beta)",
        *([], [some(4, B, then=[0.3])]),
    ),
    "frontier.gibbs_frontier": (
        "(reward, betas, log_ratio=None, gold=None)",
        *([], [some(1, B, N, then=[[0.1, 1.0]]), lambda: (draw(B, N), [0.5], draw(B, N), draw(B, N))]),
    ),
    "frontier.best_of_n_kl": ("(n)", [], [lambda: (7,)]),
    "frontier.win_rate": ("(score_a, score_b)", [], [lambda: (draw(N).round(), draw(N).round())]),
}


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
    first, *others = arguments()
    if isinstance(first, torch.Tensor):
        first.requires_grad_()
    results = function(first, *others)
    loss = results[0] if isinstance(results, tuple) else results
    if getattr(loss, "requires_grad", False):
        loss.sum().backward()
    return results, getattr(first, "grad", None)


@pytest.mark.parametrize("name", PROMISED)
def test_a_copy_has_the_signature_and_gives_the_same_results(name):
    script, function = name.split(".")
    signature, along, cases = PROMISED[name]
    original = getattr(importlib.import_module(script), function)
    assert str(inspect.signature(original)) == signature and inspect.getdoc(original)
    for arguments in cases:
        found, expected = tried(taken_out(name, along), arguments), tried(original, arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for i, part in enumerate(along):  # nothing comes along in vain
        with pytest.raises(NameError, match=part):
            tried(taken_out(name, along[:i] + along[i + 1 :]), cases[0])


def test_float32_whatever_the_dtype_of_the_model():
    """This promise of response_logps is not in its signature."""
    model, *arguments = tokens()
    logps = taken_out("p3o.response_logps", ["model_inputs"])(model.to(torch.bfloat16), *arguments)
    assert logps.dtype == torch.float32 and logps.requires_grad and logps.shape == (B, R)
    assert torch.equal(logps == 0, ~mask)
