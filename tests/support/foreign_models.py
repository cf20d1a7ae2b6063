"""Small models of transformers' own classes at random weights, and what is compared with them."""

import pathlib
from typing import Any

import numpy as np

import megatransformer_jax as mt

VOCABULARY = 61
# Of Llama and its relatives; grouped heads.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "eos_token_id": None,
    "bos_token_id": None,
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
PROMPT = TOKENS[0, :9].tolist()
NEW_TOKENS = 32


def random_model(config: Any, seed: int = 0, dtype: str = "float32") -> Any:
    """transformers' model for its config; norms and biases are random as well."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def their_logits(model: Any) -> np.ndarray:
    """[2, 40, V], of `TOKENS`."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def their_greedy(model: Any) -> list[int]:
    """What follows `PROMPT`."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    return tokens[0, len(PROMPT) :].tolist()


def our_greedy(lm: mt.Model) -> list[int]:
    """The same with our cache."""
    (completion,) = lm.generate([PROMPT], strategy="greedy", max_new_tokens=NEW_TOKENS)
    return list(completion.token_ids)


def saved_by_transformers(folder: pathlib.Path) -> Any:
    """transformers' model of a folder that we wrote."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    return AutoModelForCausalLM.from_pretrained(folder).eval()
