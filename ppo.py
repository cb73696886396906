"""PPO (Schulman et al. 2017, arXiv:1707.06347, [PPO]) for language models, the baseline of P3O.

PPO treats each token as an action. A critic predicts at each token how much reward is still to come. Tokens
that were followed by more reward than predicted become more probable.

    python toy.py && python sft.py && python reward_model.py    # the stages before this one
    python ppo.py                                               # a minute on one CPU core; its last line:
    out/ppo, step 60: gain 2.02 over the SFT model, reward 2.094 at KL 1.23 nats/response on held-out prompts

    token rewards   r_t = -beta log(pi_old / pi_SFT)(y_t), plus r(x, y) at the last token   token_rewards
    advantages      A_t = sum_l (gamma lam)^l delta_{t+l}, and returns R_t = A_t + V_t      gae
    PPO-Clip        max E min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                 ppo_clip_loss
    PPO-Penalty     max E rho_t A_t - c KL(pi_old || pi)                                    ppo_penalty_loss
    critic          min E max((V - R)^2, (clip(V, V_old -+ eps_V) - R)^2) / 2               value_loss

Read "the mathematics" first, then update_models and train_step at the end. ALGORITHM.md lists the tricks of
[Secrets] (Zheng et al. 2023, 2307.04964); --preset ppo_max is its recipe. [GAE] is 1506.02438, [KL] Ziegler
et al. 2019, 1909.08593, and [N+] Huang et al. 2024, 2403.17031.

Departures: KL(pi_old || pi) is estimated from samples. Advantages are whitened over the rollout. The ptx term
uses demonstrations. A response that is cut off before EOS loses --missing_eos_penalty.

Notation: B prompts, K responses per prompt, N = B * K rows, P prompt length, R response length, V vocabulary.
Prompts are padded on the left and responses on the right. Masks are boolean and True for real tokens. Names
that end in _tok are (N, R). In equations V is the value and R the return. In logs "reward" is the score.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    preset: Literal["ppo", "ppo_max"] = flag("ppo", "recipe with defaults for other flags; see PRESETS")
    model: str = flag("out/sft", "SFT model: the policy starts from it, and the KL is measured against it")
    reward_model: str = flag("out/reward_model", "sequence-classification model with one label")
    dataset: str = flag("data/toy/prompts", "hub name or folder with a text column 'prompt'; see data.py")
    output_dir: str = flag("out/ppo", "folder for the trained model, the logs, the checkpoint and critic/")
    seed: int = flag(0, "seed of the data order and of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    learning_rate: float = flag(3e-4, "Adam's rate, which falls linearly to 0; 5e-7 for 7B in [Secrets]")
    critic_learning_rate: float = flag(1e-3, "rate for the critic, which falls too; 1.65e-6 in [Secrets]")
    steps: int = flag(60, "number of rollouts; if --resume raises it, the learning rate jumps up")
    prompts_per_step: int = flag(64, "B, prompts per rollout; small rollouts are stabler [Secrets]")
    num_responses: int = flag(2, "K, responses per prompt")
    epochs: int = flag(2, "passes over each rollout, usually 1 to 4")
    minibatch_size: int = flag(32, "prompts per optimizer step, each with all its responses")
    micro_batch_size: int = flag(32, "prompts per forward and backward pass; a lower number saves memory")
    beta: float = flag(0.5, "weight of the KL to the SFT model in the token rewards")
    kl_target: float | None = flag(None, "target KL in nats per response for an adaptive beta")
    kl_horizon: float = flag(1000, "responses over which beta adapts to --kl_target; 10000 in [KL]")
    gamma: float = flag(1.0, "discount per token")
    lam: float = flag(0.95, "lambda of GAE; 1 gives Monte-Carlo returns, 0 gives one-step TD errors")
    policy_loss: Literal["clip", "penalty"] = flag("clip", "PPO-Clip or PPO-Penalty")
    clip_range: float = flag(0.2, "epsilon of PPO-Clip")
    penalty_coef: float = flag(0.5, "weight of KL(pi_old || pi) per token in PPO-Penalty")
    value_clip_range: float = flag(0.2, "largest change of a value in one rollout; inf for no limit")
    normalize_reward: bool = flag(False, "normalize scores by the mean and std of all scores so far")
    scale_reward: bool = flag(False, "divide scores by the std of all scores so far; not in PPO-max")
    reward_clip: float | None = flag(None, "largest absolute normalized score; 0.3 to 0.8 in [Secrets]")
    whiten_advantages: bool = flag(True, "normalization of advantages to mean 0 and std 1 [N+]")
    advantage_clip: float = flag(math.inf, "largest absolute advantage; 0.12 to 0.5 in [Secrets]")
    critic_init: Literal["reward", "sft"] = flag("reward", "reward model, or SFT model with a zero head")
    critic_warmup_steps: int = flag(0, "number of first steps that train only the critic")
    ptx_coef: float = flag(0.0, "weight of the demonstrations' log-likelihood per token (PPO-ptx)")
    ptx_dataset: str = flag("data/toy/sft", "demonstrations for --ptx_coef: columns prompt, completion")
    reward_shift: float = flag(0.0, "size of a random offset per prompt, which the critic has to learn")
    missing_eos_penalty: float = flag(1.0, "number subtracted from the score of a response without EOS")
    temperature: float = flag(1.0, "number that divides the logits, in sampling and in every log-prob")
    prompt_length: int = flag(32, "longest prompt in tokens; longer ones are left out")
    response_length: int = flag(24, "maximum number of sampled tokens, EOS included")
    max_grad_norm: float = flag(1.0, "largest norm of a model's gradient; a longer one is scaled down to it")
    eval_every: int = flag(20, "steps between evaluations; there is one at step 0 and at the end")
    eval_prompts: int = flag(256, "number of held-out prompts to evaluate on")
    save_every: int = flag(20, "steps between checkpoints; there is one at step 0 and at the end")
    resume: bool = flag(False, "continue from the last checkpoint; most flags must stay the same")
    overwrite: bool = flag(False, "start again in an output_dir that already holds a run")


PRESETS = {  # the defaults that a preset changes
    "ppo": {},
    "ppo_max": {  # [Secrets, sec. 5.4]
        "beta": 0.05,
        "normalize_reward": True,
        "reward_clip": 0.8,
        "whiten_advantages": False,
        "critic_warmup_steps": 10,
        "ptx_coef": 0.05,
    },
}


# ------------------------------------------------------------------------------------------- the mathematics
def masked_mean(x, mask):
    """Mean of x where mask is True. Other entries, even nan, change nothing and get no gradient."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def masked_whiten(x, mask, shift_mean=True):
    """(x - mean) / std where mask is True, 0 elsewhere. With shift_mean=False the mean is added back."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) / (masked_mean((x - mean) ** 2, mask) + 1e-8).sqrt()
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def token_rewards(score, logp_old_tok, logp_ref_tok, response_mask, beta):
    """r_t = -beta (log pi_old - log pi_SFT)(y_t), plus the score at the last response token [N+].

    score is (N,), the other tensors are (N, R), and log-probs are in nats. Returns (N, R), 0 off the mask.
    """
    kl = (logp_old_tok - logp_ref_tok).masked_fill(~response_mask, 0.0)
    last = response_mask & (response_mask.cumsum(1) == response_mask.sum(1, keepdim=True))
    return score.unsqueeze(1) * last - beta * kl


@torch.no_grad()
def gae(reward_tok, value_tok, response_mask, gamma=1.0, lam=0.95):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, where delta_t = r_t + gamma V_{t+1} - V_t [GAE].

    All tensors are (N, R). V is 0 after the end. Returns (advantages, returns = A + V), 0 outside the mask.
    """
    reward, value = (x.masked_fill(~response_mask, 0.0) for x in (reward_tok, value_tok))
    delta = reward + gamma * torch.nn.functional.pad(value[:, 1:], (0, 1)) - value  # (N, R)
    advantages, running = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + value


def importance_ratio(logp_new_tok, logp_old_tok, response_mask):
    """rho_t = pi(y_t) / pi_old(y_t), (N, R) and 1 outside the mask. Returns (rho, approx_kl, stats).

    approx_kl, the mean over tokens of rho - 1 - log rho, estimates KL(pi_old || pi) in nats per token without
    bias. log rho is clamped to [-20, 20] so that float32 stays finite. No gradient flows beyond that.
    """
    log_ratio = (logp_new_tok - logp_old_tok).masked_fill(~response_mask, 0.0)
    rho = log_ratio.clamp(-20, 20).exp()
    approx_kl = masked_mean(rho - 1 - log_ratio.clamp(-20, 20), response_mask)
    return rho, approx_kl, {"approx_kl": approx_kl.item(), "log_ratio_max": log_ratio.abs().max().item()}


def ppo_clip_loss(logp_new_tok, logp_old_tok, advantages, response_mask, clip_range=0.2):
    """-E_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t), a mean over response tokens [PPO, eq. 7].

    All tensors are (N, R), and log-probs are in nats. Returns the loss, a scalar, and {"clip_fraction": share
    of tokens whose gradient the clip removed, "log_ratio_max": max |log rho|, "approx_kl"}.
    """
    rho, _, stats = importance_ratio(logp_new_tok, logp_old_tok, response_mask)
    unclipped, clipped = rho * advantages, rho.clamp(1 - clip_range, 1 + clip_range) * advantages
    stats["clip_fraction"] = masked_mean((clipped < unclipped).float(), response_mask).item()
    return -masked_mean(torch.minimum(unclipped, clipped), response_mask), stats


def ppo_penalty_loss(logp_new_tok, logp_old_tok, advantages, response_mask, penalty):
    """-E_t rho_t A_t + penalty KL(pi_old || pi) [PPO, eq. 8]. Shapes and stats are as in ppo_clip_loss."""
    rho, approx_kl, stats = importance_ratio(logp_new_tok, logp_old_tok, response_mask)
    surrogate = masked_mean(rho * advantages, response_mask)
    return penalty * approx_kl - surrogate, stats | {"clip_fraction": 0.0}


def value_loss(value_new_tok, value_old_tok, returns, response_mask, clip_range=0.2):
    """E_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, a mean over response tokens [N+].

    All tensors are (N, R). With clip_range=None it is half the mean squared error. The loss is a scalar.
    """
    new, old = value_new_tok.masked_fill(~response_mask, 0.0), value_old_tok
    clipped = new if clip_range is None else old + (new - old).clamp(-clip_range, clip_range)
    errors = torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)
    return masked_mean(errors, response_mask) / 2


class RunningNormalizer:
    """(x - mean) / std over all numbers so far, then clipped to [-clip, clip] [Secrets].
    shift_mean=False only divides by std (the population's), and scale=False only clips.
    """

    def __init__(self, shift_mean=True, scale=True, clip=None):
        self.shift_mean, self.scale, self.clip = shift_mean, scale, clip
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares is the sum of (x - mean)^2

    def __call__(self, x):
        """Adds x (any shape) to the statistics and returns x normalized by them."""
        n, mean = x.numel(), x.double().mean().item()
        total, delta = self.count + n, mean - self.mean
        self.squares += ((x.double() - mean) ** 2).sum().item() + delta**2 * self.count * n / total
        self.mean, self.count = self.mean + delta * n / total, total
        if self.scale:
            std = math.sqrt(self.squares / self.count) + 1e-8
            x = (x - self.mean) / std if self.shift_mean else x / std
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state):
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def adaptive_beta(beta, kl, target, horizon, n):
    """beta (1 + clip(kl / target - 1, -0.2, 0.2) min(n / horizon, 1)) after n responses [KL]; kl in nats."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * min(n / horizon, 1))


# -------------------------------------------------------------------------------------- tokens and log-probs
# The functions from here to the main section are the same text in every training script that has them.
def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses. Positions count real tokens only, so that padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)  # (N, P + R)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def response_logps(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: (N, R), float32, 0 where response_mask is False. Gradients flow.

    Prompts (N, P) are padded on the left and responses (N, R) on the right. Masks are boolean.
    """
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    keep = response_ids.shape[1] + 1  # the last prompt token predicts the first response token
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    logps = torch.log_softmax(logits.float() / temperature, -1)  # (N, R, V)
    return logps.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1).masked_fill(~response_mask, 0.0)


def read_score(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """r(x, y), the output of the score head at the last token of each response: (N,), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # a bfloat16 head would round scores by up to 1%
        scores = model.score(hidden[:, prompt_ids.shape[1] - 1 :]).squeeze(-1)  # (N, 1 + R)
    return scores.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)  # by count: the pad id may be EOS


def read_values(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """V(x, y_<t), the output of the score head before each response token: (N, R), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # as in read_score
        return model.score(hidden[:, prompt_ids.shape[1] - 1 : -1]).squeeze(-1)


def token_rows(batch, rows):
    """Selects rows of a batch and returns its token tensors as keyword arguments for the functions above."""
    names = "prompt_ids", "prompt_mask", "response_ids", "response_mask"
    return {name: batch[name][rows] for name in names}


# ------------------------------------------------------------------------------------------- data and models
def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def load_tokenizer(args):
    """Loads the model's tokenizer and checks that its EOS is the token that ends a turn in the data set."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # safe: masks do not depend on it
    eos, record = tokenizer.eos_token, Path(args.dataset, "data.json")  # data.py writes this file
    end = json.loads(record.read_text())["eos_token"] if record.exists() else eos
    suitable = eos == end and eos and len(tokenizer) > 1  # without its files it has length 1
    check(suitable, f"{args.model} has EOS {eos!r}, {args.dataset} has {end!r}; run sft.py first")
    return tokenizer


def read_rows(name, splits, columns, tokenizer, args):
    """Reads the prompts, and the responses in these columns, of the first of these splits that there is.

    Returns {"prompt": text, "prompt_ids": tokens, "response_ids": [tokens for each column]} for each row
    within the length limits. EOS ends each response. Without a column "completion", "chosen" serves as it.
    """
    if Path(name).is_dir():  # load_dataset would cache local files and might return an older version
        files = {file.stem: file.open(encoding="utf-8") for file in Path(name).glob("*.jsonl")}
        data = {split: [json.loads(line) for line in file] for split, file in files.items()}
    else:
        data = datasets.load_dataset(name)
    split = next((split for split in splits if split in data), None)
    found = data[split][0].keys() if split and data[split] else ()
    message = f"{name} has no columns {['prompt', *columns]} in a split {splits}; make it with data.py"
    columns = ["chosen" if column == "completion" and column not in found else column for column in columns]
    check({"prompt", *columns} <= set(found), message)
    texts = {column: [row[column] for row in data[split]] for column in ["prompt", *columns]}
    ids = {column: tokenizer(texts[column], add_special_tokens=False)["input_ids"] for column in texts}
    rows = []
    for i, prompt_ids in enumerate(ids["prompt"]):
        response_ids = [ids[column][i] + [tokenizer.eos_token_id] for column in columns]
        longest = max(map(len, response_ids), default=0)
        if 0 < len(prompt_ids) <= args.prompt_length and longest <= args.response_length:
            rows += [{"prompt": texts["prompt"][i], "prompt_ids": prompt_ids, "response_ids": response_ids}]
    print(f"{name} ({split}): {len(rows)} of {len(texts['prompt'])} rows fit the length limits", flush=True)
    check(rows, f"no row fits --prompt_length {args.prompt_length} and --response_length; raise them")
    return rows


def pad_rows(prompt_ids, response_ids, tokenizer, args):
    """Pads N prompts on the left and N responses on the right. Returns a batch, a dict of tensors."""
    prompt = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    response = tokenizer.pad({"input_ids": response_ids}, padding_side="right", return_tensors="pt")
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}
    batch |= {"response_ids": response["input_ids"], "response_mask": response["attention_mask"].bool()}
    return {name: rows.to(args.device) for name, rows in batch.items()}


def data_order(num_rows, size, step, seed):
    """The row numbers of one step, from 1 on. Passes are shuffled by seeds, so there is no state to save."""
    first, last = (step - 1) * size // num_rows, (step * size - 1) // num_rows  # the passes it touches
    generators = [torch.Generator().manual_seed(seed * 10**6 + i) for i in range(first, last + 1)]
    order = torch.cat([torch.randperm(num_rows, generator=generator) for generator in generators])
    return order[(step - 1) * size - first * num_rows :][:size].tolist()


def load_model(auto_class, name, tokenizer, args, may_lack=(), **options):
    """Loads a model in float32 and in eval mode: with dropout the first importance ratio would not be 1."""
    model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    lacking = sorted(set(info["missing_keys"]) - set(may_lack))
    lacking += ["score.weight"] if "num_labels" in options and not hasattr(model, "score") else []
    check(not lacking, f"{name} lacks the weights {lacking[:3]}; give a model that has them")
    other_heads = ("lm_head.", "embed_out.") if "num_labels" in options else ()
    unread = [key for key in info["unexpected_keys"] if not key.startswith(other_heads)]
    unread += [file.name for file in Path(name).glob("adapter_config.json")]
    check(not unread, f"{name} holds {unread[:3]}, which would be ignored; give a model without them")
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    check(highest < rows, f"{name} has {rows} embeddings, too few for token id {highest}; resize them")
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = args.prompt_length + args.response_length <= limit
    check(fitting, f"{name} takes at most {limit} tokens; lower --prompt_length or --response_length")
    return model.eval().to(args.device)


def load_reward(tokenizer, args):
    """The reward r(x, y): a function from a batch to N scores. Replace it to use a reward of your own."""
    model = load_model(AutoModelForSequenceClassification, args.reward_model, tokenizer, args, num_labels=1)
    matches = AutoTokenizer.from_pretrained(args.reward_model).get_vocab() == tokenizer.get_vocab()
    check(matches, f"{args.reward_model} has another tokenizer; see 'Your own reward' in README.md")
    num_ids = transformers.AutoConfig.from_pretrained(args.model).vocab_size  # ids the policy can sample
    check(num_ids <= model.config.vocab_size, f"{args.reward_model} needs {num_ids} embeddings; resize them")
    model.requires_grad_(False)
    return lambda batch: read_score(model, **token_rows(batch, slice(None)))


def load_critic(tokenizer, args):
    """The model that is trained as V: a second reward model, or the SFT model with a score head of zeros."""
    from_sft = args.critic_init == "sft"
    name, may_lack = (args.model, ["score.weight"]) if from_sft else (args.reward_model, [])
    critic = load_model(AutoModelForSequenceClassification, name, tokenizer, args, may_lack, num_labels=1)
    if from_sft:
        torch.nn.init.zeros_(critic.score.weight)
    return critic


# --------------------------------------------------------------------------- rollout, metrics and evaluation
def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.no_grad()
def sample_batch(policy, rows, num_responses, tokenizer, args):
    """Samples K responses to each of B prompts. Returns a batch: a dict of tensors and lists of N rows."""
    rows = [row for row in rows for _ in range(num_responses)]
    prompt_ids = {"input_ids": [row["prompt_ids"] for row in rows]}
    prompt = tokenizer.pad(prompt_ids, padding_side="left", return_tensors="pt").to(args.device)
    with autocast(args):  # main has set the temperature and the length in policy.generation_config
        ids = policy.generate(**prompt)[:, prompt["input_ids"].shape[1] :]  # (N, R)
    is_eos = ids == tokenizer.eos_token_id
    mask = is_eos.cumsum(1) - is_eos.int() == 0  # True up to and including the first EOS
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}  # (N, P)
    batch |= {"response_ids": ids, "response_mask": mask, "ended": is_eos.any(1)}  # (N, R), (N, R), (N,)
    batch["prompt"] = [row["prompt"] for row in rows]
    batch["response"] = [tokenizer.decode(y[m], skip_special_tokens=True) for y, m in zip(ids, mask)]
    return batch


def compute_scores(reward_function, batch):
    """Calls the reward function, checks that it gives N finite numbers, and returns them as a list."""
    scores = reward_function(batch)
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    complete = isinstance(scores, list) and len(scores) == len(batch["response"])
    check(complete, f"the reward is {scores!r:.50}; return a list of one number for each response")
    for score, response in zip(scores, batch["response"]):
        finite = hasattr(score, "__float__") and math.isfinite(score)
        check(finite, f"the reward of the response {response!r:.60} is {score!r}; return a finite number")
    return scores


@torch.no_grad()
def score_batch(batch, policy, reference, reward_function, args):
    """Adds score (N,), logp_old_tok and logp_ref_tok (N, R). float64 lets offsets of the score cancel."""
    scores, logp_old, logp_ref = [], [], []
    size = args.micro_batch_size * args.num_responses
    for first in range(0, len(batch["prompt"]), size):
        part = {name: values[first : first + size] for name, values in batch.items()}
        tokens = token_rows(part, slice(None))
        with autocast(args):
            logp_old.append(response_logps(policy, **tokens, temperature=args.temperature))
            logp_ref.append(response_logps(reference, **tokens, temperature=args.temperature))
            scores += compute_scores(reward_function, part)
    batch["score"] = torch.tensor(scores, dtype=torch.float64, device=args.device)
    batch["score"] -= args.missing_eos_penalty * ~batch["ended"]
    batch["logp_old_tok"], batch["logp_ref_tok"] = torch.cat(logp_old), torch.cat(logp_ref)


def batch_metrics(batches):
    """Means over scored batches. KL (nats per response) and entropy (nats per token) are sample estimates."""
    parts = []
    for batch in batches:
        old, ref = batch["logp_old_tok"].sum(1), batch["logp_ref_tok"].sum(1)
        parts.append(torch.stack([batch["score"], old, ref, batch["response_mask"].sum(1), batch["ended"]]))
    score, logp_old, logp_ref, length, ended = torch.cat(parts, 1).mean(1).tolist()  # parts: (5, N) each
    metrics = {"reward": score, "kl": logp_old - logp_ref, "entropy": -logp_old / length}
    return metrics | {"response_length": length, "eos_rate": ended}


def evaluate(step, policy, reference, reward_function, held_out, tokenizer, args):
    """Metrics on the held-out prompts, always with the same seed. Writes the texts to samples_STEP.jsonl."""
    torch.manual_seed(args.seed * 10**6)
    batches, folder = [], Path(args.output_dir)
    for rows in (held_out[first : first + 128] for first in range(0, len(held_out), 128)):
        batches.append(sample_batch(policy, rows, 1, tokenizer, args))
        score_batch(batches[-1], policy, reference, reward_function, args)
    texts = [row for b in batches for row in zip(b["prompt"], b["response"], b["score"].tolist())]
    lines = [json.dumps(dict(zip(("prompt", "response", "reward"), row))) + "\n" for row in texts]
    (folder / f"samples_{step}.jsonl").write_text("".join(lines))
    metrics = {f"eval_{name}": value for name, value in batch_metrics(batches).items()}
    log = (folder / "metrics.jsonl").read_text().splitlines()
    start = json.loads(log[0]) if log else metrics  # at step 0 the policy is the SFT model
    metrics["eval_gain"] = metrics["eval_reward"] - start["eval_reward"]
    text = "gain {eval_gain:.2f} over the SFT model, reward {eval_reward:.3f} at KL {eval_kl:.2f} nats"
    tqdm.write(f"{folder}, step {step}: {text.format(**metrics)}/response on held-out prompts")
    return metrics


# ------------------------------------------------------------------------------- the run folder and failures
def check_args(args, may_be_zero):
    """Checks that numbers are in range and that the output folder is free or holds a run to go on with."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "this script is one process; see examples/ for several")
    folder = Path(args.output_dir)
    for name, value in vars(args).items():
        in_range = type(value) not in (int, float) or value > 0 or (value == 0 and name in may_be_zero)
        check(in_range, f"--{name} {value} is out of range; give a larger number")
        names_input = name in ("model", "reward_model", "dataset") and value
        inside = names_input and Path(value).resolve().is_relative_to(folder.resolve())
        check(not inside, f"--{name} lies inside --output_dir; give another --output_dir")
    check(folder.is_dir() or not os.path.lexists(folder), f"{folder} is no folder; give another --output_dir")
    is_run = (folder / "args.json").exists() and args.resume != args.overwrite  # exactly one of the two
    free = is_run or not any(folder.glob("*"))
    check(free, f"{folder} is not empty; --resume or --overwrite its run, or give another --output_dir")


def open_run(model, optimizer, args):
    """Claims the output folder. Returns the checkpoint to --resume from; its step is -1 if there is none."""
    folder, checkpoint = Path(args.output_dir), {"step": -1, "log_size": 0}
    if args.resume and (folder / "checkpoint.pt").exists():
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        may_change = "output_dir steps save_every micro_batch_size device resume overwrite".split()
        for name in vars(args).keys() - may_change:
            before, now = str(checkpoint["args"].get(name)), str(getattr(args, name))
            unchanged = os.path.realpath(before) == os.path.realpath(now)  # so that out/sft equals ./out/sft
            check(unchanged, f"--{name} was {before} and is now {now}; --resume cannot change it")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "args.json", "w" if args.resume or args.overwrite else "x") as file:
            json.dump({"args": vars(args)}, file, indent=2)
    except FileExistsError:
        sys.exit(f"error: another run has just begun in {folder}; give another --output_dir")
    old_files = [] if checkpoint["step"] >= 0 else ["checkpoint.pt", "config.json", "samples_*.jsonl"]
    for pattern in [*old_files, "**/.tmp*"]:  # a kill while safetensors writes leaves .tmp files
        for file in folder.glob(pattern):
            file.unlink()
    with open(folder / "metrics.jsonl", "a") as log:
        log.truncate(checkpoint["log_size"])  # drops the steps after the checkpoint, which will be done again
    return checkpoint


def save(step, model, optimizer, tokenizer, args, **more):
    """Exports the model for from_pretrained, then replaces the checkpoint in one move."""
    folder = Path(args.output_dir)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = {"step": step, "args": vars(args), "log_size": (folder / "metrics.jsonl").stat().st_size}
    checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
    torch.save(checkpoint, folder / "checkpoint.pt.new")
    os.replace(folder / "checkpoint.pt.new", folder / "checkpoint.pt")


# ------------------------------------------------------------------------------------------------------ main
def policy_and_value_loss(policy, critic, batch, rows, args):
    """Returns the sum of both losses, each a mean over the response tokens of these rows, and stats."""
    tokens = token_rows(batch, rows)
    with autocast(args):
        logp_new = response_logps(policy, **tokens, temperature=args.temperature)
        value_new = read_values(critic, **tokens)
    names = "logp_old_tok", "advantages", "value_old_tok", "returns", "response_mask"
    logp_old, advantages, value_old, returns, mask = (batch[name][rows] for name in names)
    if args.policy_loss == "clip":
        policy_loss, stats = ppo_clip_loss(logp_new, logp_old, advantages, mask, args.clip_range)
    else:
        policy_loss, stats = ppo_penalty_loss(logp_new, logp_old, advantages, mask, args.penalty_coef)
    critic_loss = value_loss(value_new, value_old, returns, mask, args.value_clip_range)
    return policy_loss + critic_loss, stats | {"loss": policy_loss.item(), "value_loss": critic_loss.item()}


def backward_demonstrations(policy, rows, tokenizer, args):
    """Adds the gradient of -ptx_coef E log pi(y_t | x, y_<t). Returns that mean in nats per token."""
    texts = [row["prompt_ids"] for row in rows], [row["response_ids"][0] for row in rows]
    batch, mean_logp = pad_rows(*texts, tokenizer, args), 0.0
    for part in torch.arange(len(rows)).split(args.micro_batch_size):
        with autocast(args):
            logp = response_logps(policy, **token_rows(batch, part), temperature=args.temperature)
        share = logp.sum() / batch["response_mask"].sum()
        if share.requires_grad:  # which is not so while only the critic learns
            (-args.ptx_coef * share).backward()
        mean_logp += share.item()
    return mean_logp


def update_models(policy, critic, optimizer, batch, minibatch, ptx_rows, tokenizer, args):
    """One optimizer step of both models. Micro-batches are weighted by their tokens."""
    K, metrics = args.num_responses, {"log_ratio_max": 0.0}
    num_tokens = batch["response_mask"].unflatten(0, (-1, K))[minibatch].sum()
    for prompts in minibatch.split(args.micro_batch_size):
        rows = (prompts.unsqueeze(1) * K + torch.arange(K)).flatten()  # all K rows of each prompt
        share = (batch["response_mask"][rows].sum() / num_tokens).item()
        loss, stats = policy_and_value_loss(policy, critic, batch, rows, args)
        (loss * share).backward()
        log_ratio_max = max(metrics["log_ratio_max"], stats["log_ratio_max"])
        metrics = {name: metrics.get(name, 0.0) + stats[name] * share for name in stats}
        metrics["log_ratio_max"] = log_ratio_max
    if args.ptx_coef > 0:
        rows = [ptx_rows[number] for number in torch.randint(len(ptx_rows), (len(minibatch),))]
        metrics["ptx_logp"] = backward_demonstrations(policy, rows, tokenizer, args)
    for name, model in (("grad_norm", policy), ("critic_grad_norm", critic)):
        metrics[name] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(sum(metrics.values()))
    check(finite, "a loss or its gradient is not finite; start again with lower learning rates")
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def train_step(step, beta, models, critic, optimizer, normalizer, prompts, ptx_rows, offset, tokenizer, args):
    """One iteration of PPO. Returns its metrics."""
    policy, reference, reward = models
    start, B, K = time.perf_counter(), args.prompts_per_step, args.num_responses
    torch.manual_seed(args.seed * 10**6 + step)  # so that a resumed run draws the same numbers
    for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.critic_learning_rate)):
        group["lr"] = rate * (1 - (step - 1) / args.steps)
    policy.requires_grad_(step > args.critic_warmup_steps)  # until then, only the critic learns
    # 1. Sample K responses to each of B prompts from pi_old, which is the present policy.
    numbers = data_order(len(prompts), B, step, args.seed)
    batch = sample_batch(policy, [prompts[number] for number in numbers], K, tokenizer, args)
    # 2. Compute the token rewards, values, advantages and returns.
    score_batch(batch, policy, reference, reward, args)
    score = normalizer((batch["score"].view(B, K) + offset[numbers]).flatten())  # (N,)
    with torch.no_grad(), autocast(args):
        parts = [token_rows(batch, rows) for rows in torch.arange(B * K).split(args.micro_batch_size * K)]
        value = torch.cat([read_values(critic, **part) for part in parts])  # (N, R)
    mask = batch["response_mask"]
    reward_tok = token_rewards(score, batch["logp_old_tok"], batch["logp_ref_tok"], mask, beta)
    advantages, returns = gae(reward_tok, value, mask, args.gamma, args.lam)
    _, monte_carlo_returns = gae(reward_tok, value, mask, args.gamma, 1.0)  # they do not depend on the values
    metrics = batch_metrics([batch]) | {"beta": beta}
    errors, variance = (monte_carlo_returns - value)[mask], monte_carlo_returns[mask].var(correction=0)
    metrics["explained_variance"] = 1 - (errors.var(correction=0) / variance.clamp(min=1e-12)).item()
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
    batch |= {"value_old_tok": value, "advantages": advantages.float(), "returns": returns.float()}
    # 3. Maximize the clipped objective and fit the critic to the returns for some epochs of minibatches.
    updates, settings = [], (ptx_rows, tokenizer, args)
    for _ in range(args.epochs):
        for minibatch in torch.randperm(B).split(args.minibatch_size):
            updates.append(update_models(policy, critic, optimizer, batch, minibatch, *settings))
    # Report the metrics.
    metrics |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    metrics["log_ratio_max"] = max(update["log_ratio_max"] for update in updates)
    return metrics | {"seconds": time.perf_counter() - start}


def parse_args(argv=None):
    """Reads the command line. A preset changes the defaults, so that flags that the user gives win."""
    argv = sys.argv[1:] if argv is None else argv
    parser = transformers.HfArgumentParser(Args, usage="python ppo.py [--flag value ...]", allow_abbrev=False)
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**PRESETS[known.preset])
    return Args(**vars(parser.parse_args(argv)))


def main(args):
    may_be_zero = "seed beta lam penalty_coef critic_warmup_steps ptx_coef reward_shift missing_eos_penalty"
    check_args(args, may_be_zero.split())
    check(args.gamma <= 1 and args.lam <= 1, "--gamma and --lam must be at most 1")
    check(args.prompts_per_step % args.minibatch_size == 0, "--minibatch_size must divide --prompts_per_step")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    try:
        tokenizer = load_tokenizer(args)
        prompts = read_rows(args.dataset, ["train"], [], tokenizer, args)
        held_out = read_rows(args.dataset, ["validation", "test"], [], tokenizer, args)[: args.eval_prompts]
        ptx_rows = args.ptx_coef and read_rows(args.ptx_dataset, ["train"], ["completion"], tokenizer, args)
        policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
        models = policy, reference.requires_grad_(False), load_reward(tokenizer, args)
        critic = load_critic(tokenizer, args)
    except (OSError, ValueError) as error:
        names = f"{args.model}, {args.reward_model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run the stages before this one")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    groups = [{"params": model.parameters()} for model in (policy, critic)]  # each has its learning rate
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)
    scales = args.normalize_reward or args.scale_reward
    normalizer = RunningNormalizer(args.normalize_reward, scales, args.reward_clip)
    offset = args.reward_shift * torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0))
    offset = ((256 * offset).round() / 256).double().to(args.device)  # float64 adds such numbers exactly
    checkpoint = open_run(policy, optimizer, args)
    critic.load_state_dict(checkpoint.get("critic", critic.state_dict()))
    normalizer.load_state_dict(checkpoint.get("normalizer", normalizer.state_dict()))
    beta, next_step = checkpoint.get("beta", args.beta), checkpoint["step"] + 1
    more = critic, optimizer, normalizer, prompts, ptx_rows, offset
    bar = tqdm(range(next_step, args.steps + 1), "ppo", args.steps + 1, initial=next_step, disable=None)
    for step in bar:  # step 0 only evaluates and saves the SFT model
        metrics = train_step(step, beta, models, *more, tokenizer, args) if step > 0 else {}
        if args.kl_target and step > args.critic_warmup_steps:
            num_rows = args.prompts_per_step * args.num_responses
            beta = adaptive_beta(beta, metrics["kl"], args.kl_target, args.kl_horizon, num_rows)
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= evaluate(step, *models, held_out, tokenizer, args)
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl") if name in metrics})
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
            log.write(json.dumps({"step": step, **metrics}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            for part in (critic, tokenizer):
                part.save_pretrained(Path(args.output_dir, "critic"))
            state = {"critic": critic.state_dict(), "normalizer": normalizer.state_dict(), "beta": beta}
            save(step, policy, optimizer, tokenizer, args, **state)


if __name__ == "__main__":
    main(parse_args())
