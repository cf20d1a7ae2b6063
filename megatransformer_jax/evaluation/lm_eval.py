"""A model of ours as a model of EleutherAI's lm-eval, so that its tasks can be run at any depth.

    lm = MegaTransformerLM(model, params, tokenizer, depth=16, batch_size=8)
    lm_eval.simple_evaluate(lm, tasks=["my_task"])

Importing this module needs lm-eval (extra 'eval'). The command line is `megatransformer lm-eval`.
"""

import json
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.log_likelihood import Continuation, LogLikelihoodScorer
from megatransformer_jax.generation.generator import Generator, continue_in_batches
from megatransformer_jax.models.megatransformer import MegaTransformer

# ------------------------------------------------------------------------------
# The adapter.

# Tokens per answer of a task that does not say, as lm-eval's Hugging Face model has it.
MAX_GEN_TOKS = 256


class MegaTransformerLM(TemplateLM):
    """Scores and continues texts for lm-eval.

    As in lm-eval's Hugging Face model, an empty context, and the beginning of a text whose
    perplexity is measured, are the start token; contexts that are too long lose their beginning.
    Unlike there, contexts begin with the start token unless `add_bos_token` says otherwise: our
    models have seen it before every document.

    Args:
      model: the model, without a mesh.
      params: its parameters.
      tokenizer: of the model.
      depth: iterations of the core, of scores and of generation; None: the model has no core.
      batch_size: rows at once.
      max_length: most tokens that the model reads at once. None: the model's own.
      max_gen_toks: tokens per answer of tasks that do not say.
      add_bos_token: puts the start token before every context.
      seed: of draws, and of the core's first states.

    Raises:
      ValueError: if depth does not go with the model, or a number is out of range.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        tokenizer: Tokenizer,
        *,
        depth: int | None,
        batch_size: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self._model = model
        self._params = params
        self._tokenizer = tokenizer
        self._depth = depth
        self._batch_size = batch_size
        self._max_length = model.config.max_length if max_length is None else max_length
        self._max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._seed = seed
        self._scorer = LogLikelihoodScorer(
            model,
            params,
            depth=depth,
            batch_size=batch_size,
            max_length=self._max_length,
            seed=seed,
        )

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the start token."""
        return self._tokenizer.bos_id

    @property
    def batch_size(self) -> int:
        """Rows at once; lm-eval writes it to its results."""
        return self._batch_size

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with the start token unless it is unwanted, or the text spells it itself."""
        if kwargs:
            raise ValueError(f"tok_encode has no argument {next(iter(kwargs))}.")
        ids = self._tokenizer.encode(string)
        wants_bos = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if wants_bos and ids[:1] != [self._tokenizer.bos_id]:
            return [self._tokenizer.bos_id, *ids]
        return ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token with as much context as windows leave it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for context, tokens in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window((context, tokens))))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_prob, _) in zip(owners, scores, strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        continuations = [Continuation(context, tokens) for _, context, tokens in requests]
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            likelihoods = self._scorer.score(continuations, bar.update)
        answers = [(likelihood.log_prob, likelihood.is_greedy) for likelihood in likelihoods]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, an end token or the number of tokens.

        Raises:
          UserError: for generation arguments that are not known.
        """
        # Requests with the same arguments are continued together.
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(key, []).append(number)
        texts: dict[int, str] = {}
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for numbers in groups.values():
                config = self._generation_config(requests[numbers[0]].args[1])
                completions = continue_in_batches(
                    self._generator,
                    config,
                    [self._prompt(requests[number].args[0], config) for number in numbers],
                    batch_size=self._batch_size,
                    progress=bar.update,
                )
                for number, completion in zip(numbers, completions, strict=True):
                    texts[number] = completion.text
                    request = requests[number]
                    self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [texts[number] for number in range(len(requests))]

    def _generation_config(self, arguments: dict[str, Any]) -> GenerationConfig:
        config = generation_config(
            arguments,
            max_gen_toks=self._max_gen_toks,
            batch_size=self._batch_size,
            depth=self._depth,
            seed=self._seed,
        )
        if config.max_new_tokens >= self._max_length:
            raise UserError(
                f"max_gen_toks={config.max_new_tokens} leaves no room for a context, as the model "
                f"reads {self._max_length} tokens; lower it in the task or with --gen_kwargs, or "
                "raise max_length."
            )
        return config

    def _prompt(self, context: str, config: GenerationConfig) -> list[int]:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self._max_length - config.max_new_tokens) :]

    def _generator(self, config: GenerationConfig) -> Generator:
        return Generator(self._model, self._params, self._tokenizer, config, self._depth)


# ------------------------------------------------------------------------------
# The generation arguments of lm-eval's tasks as a `GenerationConfig`.

# What lm-eval's other models take as "does nothing". Our options are left out instead.
_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
_NAMES_OF_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def generation_config(
    arguments: Mapping[str, Any],
    *,
    max_gen_toks: int,
    batch_size: int,
    depth: int | None,
    seed: int,
) -> GenerationConfig:
    """From a task's `generation_kwargs`: greedy unless it samples with a temperature.

    Known are until, do_sample, temperature, top_k, top_p, min_p, typical_p, repetition_penalty and
    the number of tokens (max_gen_toks or one of its other names).

    Args:
      arguments: of the request.
      max_gen_toks: tokens if the request does not say.
      batch_size: texts at once.
      depth: iterations of the core; None: the model has none.
      seed: of draws.

    Raises:
      UserError: for an argument that is not known or out of range.
    """
    values: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), max_gen_toks))
    # As lm-eval's own models do, an empty text ends nothing.
    stop = tuple(text for text in values.pop("until") if text)
    length = values.pop("max_gen_toks")
    temperature = float(values.pop("temperature", 0.0))
    is_drawn = values.pop("do_sample")
    unknown = sorted(values.keys() - _NEUTRAL.keys())
    if unknown:
        known = ", ".join(("until", "do_sample", "temperature", *_NEUTRAL, *_NAMES_OF_LENGTH))
        raise UserError(
            f"generation_kwargs have {unknown[0]}={values[unknown[0]]!r}, which this model does "
            f"not know; known: {known}. Remove it from the task or from --gen_kwargs."
        )
    if is_drawn and temperature == 0:
        raise UserError(
            "generation_kwargs have do_sample=True and no temperature above 0; give one, or "
            "do_sample=False for the likeliest token."
        )
    sampling = {
        name: value for name, value in values.items() if value not in (None, _NEUTRAL[name])
    }
    if is_drawn:
        sampling["temperature"] = temperature
    return GenerationConfig(
        strategy="sample" if is_drawn else "greedy",
        max_new_tokens=length,
        batch_size=batch_size,
        seed=seed,
        stop=stop,
        depth=DepthConfig(depth=depth),
        sampling=SamplingConfig(**sampling),
    )
