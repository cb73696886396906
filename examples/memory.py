"""How much GPU memory does an update of P3O need? Computed on tensors without data, in float32.

    python examples/memory.py           a minute on one core; writes memory.jsonl beside it

A micro-batch goes through response_logps on PyTorch's meta device, where tensors have shapes but no data. We
add the tensors that autograd keeps for the backward pass, the gradients of the logits, and 24 bytes per
parameter: 16 for the policy, 4 for the reference and 4 for the reward model. A GPU needs about 1 GB more.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import p3o  # noqa: E402

PROMPT, RESPONSE, K = 256, 128, 2  # tokens, tokens, responses per prompt
LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}
QWEN = {
    "model_type": "qwen2",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
    "vocab_size": 151936,
}
MODELS = {
    "GPT-2 124M": {"model_type": "gpt2", "attn_implementation": "eager"},
    "SmolLM2-360M": LLAMA
    | {"vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
    | {"num_attention_heads": 15, "num_key_value_heads": 5},
    "Qwen2.5-0.5B": QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
    "Qwen2.5-1.5B": QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2},
}


def update_bytes(model, prompts):
    """Bytes that one micro-batch of an update needs beside the weights."""
    N, kept = prompts * K, {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = (
                tensor.untyped_storage()
            )  # held, so that no address recurs
        return tensor

    shapes = {
        "prompt_ids": PROMPT,
        "prompt_mask": PROMPT,
        "response_ids": RESPONSE,
        "response_mask": RESPONSE,
    }
    dtypes = {"ids": torch.long, "mask": torch.bool}
    tokens = {n: torch.ones(N, s, dtype=dtypes[n.split("_")[1]], device="meta") for n, s in shapes.items()}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        p3o.response_logps(model, **tokens)
    activations = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    logits = N * RESPONSE * model.config.vocab_size * 4
    return activations + 2 * logits  # the gradient of the log-softmax, and that of the logits


def main():
    rows = []
    for name, config in MODELS.items():
        config = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        gb = {size: round((24 * parameters + update_bytes(model, size)) / 1e9, 1) for size in (1, 4, 16)}
        rows.append({"model": name, "parameters": parameters, "gb_by_micro_batch_size": gb})
        print(rows[-1], flush=True)
    Path(__file__).with_name("memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
