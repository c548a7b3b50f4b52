"""The same through `torch.compile`: ottfx is a backend named "ott", with its options in `options`.

`torch.compile(model, backend="ott").generate(...)` compiles nothing, with this backend as with any other: `generate`
is looked up on the original model and calls that model's own forward. Compile in place, as below.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ottfx


def main() -> None:
    """Compile a small random model in place with the backend "ott", and generate."""
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
    model = LlamaForCausalLM(config).eval()

    model.compile(backend="ott", dynamic=True, options={"bits": 4, "scheme": "kivi"})

    prompt = torch.randint(0, 1024, (1, 300))
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
    )
    footprint = ottfx.memory_footprint(output.past_key_values)
    print(f"{output.sequences.shape[1]} tokens in {footprint.total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
