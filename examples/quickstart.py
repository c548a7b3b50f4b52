"""Quantize the KV cache of a transformers model in one line, and generate as before.

The model is small and random, so that this runs anywhere in seconds; any causal language model takes its place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ottfx


def main() -> None:
    """Generate with a 16-bit cache and with a 2-bit one, and compare their sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    prompt = torch.randint(0, 1024, (1, 2000))
    arguments = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    arguments["attention_mask"] = torch.ones_like(prompt)

    before = model.generate(prompt, **arguments)

    model = ottfx.compile(model, bits=2)
    after = model.generate(prompt, **arguments)

    dense = ottfx.memory_footprint(before.past_key_values)
    packed = ottfx.memory_footprint(after.past_key_values)
    print(f"{after.sequences.shape[1]} tokens")
    print(f"16-bit cache: {dense.total / 1024:.0f} KiB")
    print(f"2-bit cache:  {packed.total / 1024:.0f} KiB, {packed.ratio:.1f} times smaller")
    for part, size in packed.parts.items():
        print(f"  {part}: {size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
