"""What P3O and PPO hold in memory: bytes counted in a GPT-2 of 124M random weights, and the same sums at 7B.

    python results/trl/memory.py | tee results/trl/memory.txt        a minute on two x86 cores, 5 GB

Measured: bytes of the tensors after one real P3O step, and of what autograd keeps for its backward pass.
Computed: the same by formula, for the small model as a check and for 7B parameters (32 layers, width 4096).
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import p3o  # noqa: E402

B, K, P, R = 1, 2, 96, 32
transformers.logging.set_verbosity_error()


def size(tensors):
    return sum(x.nbytes for x in tensors)


def step(policy, optimizer):
    """One P3O step in bfloat16 autocast; the bytes that autograd keeps, the weights and their casts apart."""
    torch.manual_seed(0)
    prompt_ids, response_ids = (torch.randint(9, 999, (B * K, length)) for length in (P, R))
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompt_ids, response_ids)]
    kept = {}

    def keep(x):
        if x.shape[0] == B * K:  # of the rows of this micro-batch: no weight
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        tokens = prompt_ids, masks[0], response_ids, masks[1]
        logps = p3o.response_logps(policy, *tokens).sum(1).view(B, K)
    loss, _ = p3o.p3o_loss(logps, logps.detach(), torch.randn(B, K))
    loss.backward()
    optimizer.step()
    return sum(kept.values())


def held(N, reward):
    """GB by formula, N parameters: float32 weights, gradients and two moments of AdamW are 16 bytes each."""
    return {
        "policy": 16 * N / 1e9,
        "reference": 4 * N / 1e9,
        "reward model": reward / 1e9,
        "critic": 16 * N / 1e9,
    }


def main():
    config = GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=1)
    policy, reference = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    reward = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(policy.parameters())
    activations = step(policy, optimizer)
    policy.gradient_checkpointing_enable()
    policy.train()  # checkpoints are made in training mode alone
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpointed = step(policy, optimizer)
    N = sum(x.numel() for x in policy.parameters())
    weights, gradients = size(policy.parameters()), size(x.grad for x in policy.parameters())
    moments = size(x for state in optimizer.state.values() for x in state.values())
    print(f"measured, GPT-2 of {N / 1e6:.1f}M parameters, GB:")
    parts = {
        "weights": weights,
        "gradients": gradients,
        "AdamW": moments,
        "all three": weights + gradients + moments,
    }
    parts |= {"reference": size(reference.parameters()), "reward model, bfloat16": size(reward.parameters())}
    print("  " + ", ".join(f"{name} {x / 1e9:.3f}" for name, x in parts.items()))
    small = held(N, 2 * N)
    print("computed: " + ", ".join(f"{name} {x:.3f}" for name, x in small.items()) + " (critic: PPO alone)")
    tokens, width, layers = B * K * (P + R), config.n_embd, config.n_layer
    formula = layers * tokens * width * 4 + B * K * (R + 1) * config.vocab_size * 4
    print(f"activations of {tokens} tokens, MB: measured {activations / 1e6:.1f}", end="")
    print(f", with checkpoints {checkpointed / 1e6:.1f}; computed {formula / 1e6:.1f}: ", end="")
    print("layers x tokens x width x 4 bytes, and the log-probs of the vocabulary (TRL makes them in chunks)")
    large = held(7e9, 14e9)
    print("computed, 7B, GB over all GPUs: " + ", ".join(f"{name} {x:.0f}" for name, x in large.items()))
    for gpus in (8, 16):
        shared = (large["policy"] + large["reference"]) / gpus + large["reward model"]
        both = f"P3O {shared:.1f}, PPO {shared + large['critic'] / gpus:.1f}"
        print(f"  on each of {gpus} GPUs, all sharded but the reward model: {both}")
    kept = 32 * (2 * 2 * 640) * 4096 * 4 / 1e9
    print(f"  and {kept:.1f} for the checkpoints of 2 prompts with K = 2 responses, 640 tokens a row")


if __name__ == "__main__":
    main()
