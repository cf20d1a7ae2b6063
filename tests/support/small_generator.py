"""A generator without a model: it spells the prompt backwards."""

from collections.abc import Iterator, Sequence

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.request import Completion, StreamedToken

MAX_PROMPT = 60


class SmallGenerator:
    """Takes 1, 2, 3, ... iterations, at most `depth`."""

    def __init__(self, config: GenerationConfig):
        self.config = config
        self.prompts: list[str | Sequence[int]] = []

    def stream(self, prompt: str | Sequence[int]) -> Iterator[StreamedToken]:
        self.prompts.append(prompt)
        if len(prompt) > MAX_PROMPT:
            raise ConfigError("cache.capacity", f"the prompt has {len(prompt)} tokens.")
        depth = self.config.depth.depth or 8
        for index, item in enumerate(self._continuation(prompt)):
            yield StreamedToken(BytesTokenizer().decode([item]), item, min(index + 1, depth))

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[Completion]:
        texts = []
        for prompt in prompts:
            tokens = list(self.stream(prompt))
            text = Completion(
                prompt if isinstance(prompt, str) else None,
                ("".join(token.text for token in tokens),),
                tuple(token.token_id for token in tokens),
                tuple(token.depth for token in tokens),
                -1.5,
                "length",
            )
            texts += [text] * self.config.num_samples
        return texts

    def _continuation(self, prompt: str | Sequence[int]) -> list[int]:
        ids = BytesTokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ids[::-1][: self.config.max_new_tokens]
