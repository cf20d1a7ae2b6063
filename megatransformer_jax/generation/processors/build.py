"""Builds the chain of logits processors that a configuration asks for.

The order is that of Hugging Face's `generate`: penalties, bans, and last what must be written;
then, on what is left, temperature, top-k, top-p, min-p and typical. The presence and frequency
penalties, which it lacks, follow the repetition penalty.
"""

import jax.numpy as jnp

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.endings import PieceTable, piece_table, text_automaton
from megatransformer_jax.generation.processors.cuts import MinP, Temperature, TopK, TopP, Typical
from megatransformer_jax.generation.processors.penalties import (
    CountPenalty,
    NoRepeatNgram,
    RepetitionPenalty,
)
from megatransformer_jax.generation.processors.processor import Chain, Processor, allowed_tokens
from megatransformer_jax.generation.processors.words import BannedTexts, ForcedWords, forced_words

# Up to this size another n-gram compiles nothing.
USUAL_NGRAM = 4


def build_chain(
    config: GenerationConfig,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    pieces: PieceTable | None = None,
) -> Chain:
    """The processors of a configuration, those that are at their neutral value left out.

    Temperature is always there for strategies that draw, so that changing it compiles nothing.

    Args:
      config: checked already.
      tokenizer: of the model. None: no words can be banned or forced, and all ids are allowed.
      vocab_size: width of the logits.
      pieces: `piece_table(tokenizer, vocab_size)`, if it is at hand.

    Raises:
      ConfigError: if words cannot be banned or forced.
      ValueError: if the tokenizer does not fit the model.
    """
    sampling = config.sampling
    chain = _penalties(sampling, vocab_size)
    if tokenizer is None:
        for name in ("banned_words", "forced_words"):
            if getattr(sampling, name):
                raise ConfigError(
                    f"sampling.{name}", "words need a tokenizer; this model has none."
                )
        return (*chain, *_cuts(config))
    if sampling.banned_words:
        chain.append(_banned_texts(sampling, pieces or piece_table(tokenizer, vocab_size)))
    chain.append(allowed_tokens(tokenizer, vocab_size))
    if sampling.forced_words:
        chain.append(_forced_words(config, tokenizer))
    return (*chain, *_cuts(config))


def _penalties(sampling: SamplingConfig, vocab_size: int) -> list[Processor]:
    chain: list[Processor] = []
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenalty(jnp.float32(sampling.repetition_penalty), vocab_size))
    if sampling.presence_penalty or sampling.frequency_penalty:
        presence = jnp.float32(sampling.presence_penalty)
        frequency = jnp.float32(sampling.frequency_penalty)
        chain.append(CountPenalty(presence, frequency, vocab_size))
    if sampling.no_repeat_ngram is not None:
        size = sampling.no_repeat_ngram
        chain.append(NoRepeatNgram(jnp.int32(size), max(size, USUAL_NGRAM)))
    return chain


def _cuts(config: GenerationConfig) -> list[Processor]:
    """What decides how a token is drawn; none if the likeliest is taken anyway."""
    sampling = config.sampling
    if config.strategy in ("greedy", "beam"):
        return []
    chain: list[Processor] = [Temperature(jnp.float32(sampling.temperature))]
    if sampling.top_k is not None:
        chain.append(TopK(jnp.int32(sampling.top_k)))
    if sampling.top_p is not None:
        chain.append(TopP(jnp.float32(sampling.top_p)))
    if sampling.min_p is not None:
        chain.append(MinP(jnp.float32(sampling.min_p)))
    if sampling.typical_p is not None:
        chain.append(Typical(jnp.float32(sampling.typical_p)))
    return chain


def _banned_texts(sampling: SamplingConfig, pieces: PieceTable) -> BannedTexts:
    try:
        return BannedTexts(text_automaton([sampling.banned_words], pieces))
    except UserError as error:
        raise ConfigError("sampling.banned_words", str(error)) from error


def _forced_words(config: GenerationConfig, tokenizer: Tokenizer) -> ForcedWords:
    """Each word is written after a space, and counts without one too."""
    sampling = config.sampling
    path = "sampling.forced_words"
    if config.stop:
        raise ConfigError(
            path,
            f"{sampling.forced_words!r} cannot be promised together with stop={config.stop!r}, "
            "which may end the text before they are written; leave one of them empty.",
        )
    words = []
    for word in sampling.forced_words:
        texts = [word] if word[0].isspace() else [f" {word}", word]
        texts = [text for text in texts if not any(ban in text for ban in sampling.banned_words)]
        if not texts:
            raise ConfigError(path, f"{word!r} contains one of banned_words; drop one.")
        words.append([tokenizer.encode(text) for text in texts])
    num_needed = sum(len(spellings[0]) for spellings in words)
    if num_needed > config.max_new_tokens:
        raise ConfigError(
            path,
            f"{sampling.forced_words!r} take {num_needed} tokens, more than max_new_tokens="
            f"{config.max_new_tokens}; raise that or drop words.",
        )
    return forced_words(words, config.max_new_tokens, tokenizer.eos_id)
