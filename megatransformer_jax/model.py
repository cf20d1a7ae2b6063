"""A model as users hold it: call it, generate, look at every iteration, save it.

What goes in is checked here. What cannot be used is a `UserError` that names the value, what is
allowed and the fix, never a shape error or a number that means nothing.
"""

import dataclasses
import functools
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GENERATION_OPTIONS, GenerationConfig
from megatransformer_jax.config.loop import FOREIGN_FORMATS
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    UserError,
    as_python,
    as_whole,
    declared_values,
    from_options,
    unknown_key,
)
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.sampling import GATE_THRESHOLD, DepthConfig
from megatransformer_jax.config.scoring import CalibrationConfig, ScoringConfig
from megatransformer_jax.data.chat_template import checked_variables
from megatransformer_jax.data.hf_tokenizer import require_chat_template
from megatransformer_jax.data.media.records import AudioPart, ImagePart
from megatransformer_jax.data.media_tokenizer import MARKERS
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.lens import (
    Trace,
    check_trace_size,
    make_trace,
    trace_iterations,
)
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.media_prompt import media_tokenizer, prompt_of_text
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.generation.request import (
    StreamedToken,
    encode_prompts,
    out_of_memory_is_bad_input,
)
from megatransformer_jax.models.gate_readout import GateReadout, make_readout
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.quantized import is_quantized_matrix
from megatransformer_jax.runs.checkpoint_tools import export_model, save_parameters
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.quantize import compare_models, quantize_model, save_quantized
from megatransformer_jax.storage import CHECKPOINTS, NO_CHECKPOINTS, AnyPath, as_path

# A text, texts, ids of one input, or ids of several.
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array
# Of the likeliest next tokens, as many as a line of a table shows.
_TOP_K = 5


@dataclasses.dataclass(frozen=True)
class Output:
    """What a model says of its inputs.

    Attributes:
      logits: float32 [B, T, V], scores of the next token at every position.
      latent: [B, T, D], the core's last state after the output norm; without a core the prelude's
        output.
      tokens: int32 [B, T], what was read; shorter inputs are padded at the end.
      lengths: tokens of each input. What stands beyond them means nothing.
    """

    logits: jax.Array
    latent: jax.Array
    tokens: np.ndarray
    lengths: tuple[int, ...]


class Model:
    """A model with its weights and its tokenizer: call it, generate, look inside, save it.

    Made by `load`, `create` and `Trainer.model`.

    Attributes:
      module: the Linen module; it holds no weights.
      params: nested dict of float32 arrays, on the first local device. A loaded model that computes
        in another type has them as NumPy arrays on the host, to save and to quantise.
      config: the architecture.
      tokenizer: between text and ids. None: inputs must be ids.
      trained_depth: mean iterations of the core in training, the default depth. None: no core.
      description: where it comes from.
      calibration: thresholds that exit_threshold="auto" stands for. None: not calibrated.
    """

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self.module: MegaTransformer = loaded.model
        self.params = loaded.params
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.trained_depth = loaded.trained_depth
        self.description = loaded.description
        self.calibration = loaded.calibration

    def __call__(
        self,
        inputs: Inputs,
        *,
        depth: int | None = None,
        gate_readout: str = "last",
        gate_threshold: float = GATE_THRESHOLD,
        seed: int = 0,
        **unknown: Any,
    ) -> Output:
        """Scores the next token at every position.

        Another depth compiles nothing; inputs of another shape do.

        Args:
          inputs: a text or several, or ids of one input or of several. Texts get the start token.
          depth: iterations of the core. None: the mean in training.
          gate_readout: what the output is read from: 'last', the last iteration; 'threshold' or
            'weighted', as the exit gate says (models/gate_readout.py).
          gate_threshold: cumulative exit probability of 'threshold'.
          seed: of the core's first states, where these are random; they differ between the inputs
            of one call, so that an input's numbers depend on its place among them.

        Raises:
          UserError: if an input is empty, has ids that the model does not know, or more tokens than
            `config.max_length`, or if there is no such depth or option.

        Examples:
          >>> lm(["The ", "If"], depth=3).logits.shape
          (2, 3, 512)
        """
        _reject(unknown, ("depth", "gate_readout", "gate_threshold", "seed"))
        given = {"gate_readout": gate_readout, "gate_threshold": gate_threshold}
        reading = DepthConfig(**declared_values(given, GENERATION_OPTIONS))
        reading.check_gate(self.config.exit_gate.enabled)
        readout = make_readout(reading.gate_readout, reading.gate_threshold)
        tokens, segment_ids, lengths = self._encode(inputs)
        steps, key = jnp.int32(self._depth(depth) or 0), _key(seed)
        with out_of_memory_is_bad_input():
            output = jax.block_until_ready(
                _forward(
                    self._module_for(tokens), self.weights, tokens, segment_ids, steps, key, readout
                )
            )
        return Output(output.logits, output.latent, tokens, lengths)

    def generate(
        self,
        prompts: Inputs,
        config: GenerationConfig | None = None,
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[np.ndarray] = (),
        clips: Sequence[np.ndarray] = (),
        **options: Any,
    ) -> Any:
        """Continues prompts.

        Args:
          prompts: as in `__call__`. In a model with images and sound, a text that ends with
            <|IMAGE|>, <|VOICE|> or <|AUDIO|> is continued with such a medium.
          config: how. None: `options` say.
          each: what every prompt changes for itself, a dict per prompt: its depth, criterion,
            sampling, seed, stop or max_new_tokens. All run in one batch, and each gives what it
            gives alone.
          images: of one prompt, float32 [height, width, C] in [-1, 1] of the model's format; they
            stand where the text has <|IMAGE|><|/IMAGE|>, or before it.
          clips: of one prompt, mono float32 in [-1, 1] at the model's rate; their places are
            <|VOICE|><|/VOICE|> and <|AUDIO|><|/AUDIO|>.
          **options: those of `megatransformer generate`, such as depth=16, strategy="greedy",
            exit_criterion="kl", temperature=0.7, num_samples=4, stop=("\\n",), max_new_tokens=64.

        Returns:
          One `Completion` for one prompt, a list for several prompts or samples. Its `images` and
          `mels` are what was made besides its text.

        Raises:
          UserError: if a prompt or an option cannot be used.

        Examples:
          >>> lm.generate("The ", strategy="greedy", max_new_tokens=4).depths
          (4, 4, 4, 4)
          >>> each = [{"depth": 1}, {"depth": 6, "temperature": 0.7}]
          >>> [found.depths for found in lm.generate(["The ", "If "], each=each, max_new_tokens=2)]
          [(1, 1), (6, 6)]
        """
        config = _generation(config, options)
        given, is_single = _listed(prompts)
        given = self._with_media(given, images, clips)
        with out_of_memory_is_bad_input():
            found = self._generator(config).generate(given, each)
        return found[0] if is_single and len(found) == 1 else list(found)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Answers the last of several messages, in the format that the model was trained on.

        `tokenizer.apply_chat_template` writes the messages, and `generate` continues them. The
        answer ends with any of the model's end tokens.

        Args:
          messages: [{"role": "user", "content": "..."}], and what was said before.
          config: how. None: `options` say.
          tools: JSON schemas of functions, for templates that write them.
          template_options: more that the template reads, such as {"enable_thinking": False}.
          **options: as of `generate`.

        Returns:
          A `Completion`, whose text is the answer; a list with num_samples above 1.

        Raises:
          UserError: if the tokenizer has no chat template, or it refuses the messages, or an option
            cannot be used.
        """
        template = require_chat_template(self.tokenizer)
        given = checked_variables("template_options", template_options or {})
        text = template.render(messages, tools=tools, add_generation_prompt=True, **given)
        return self.generate(typing.cast(Tokenizer, self.tokenizer).encode(text), config, **options)

    def stream(
        self,
        prompt: Inputs,
        config: GenerationConfig | None = None,
        *,
        tokens_per_call: int | None = None,
        images: Sequence[np.ndarray] = (),
        clips: Sequence[np.ndarray] = (),
        **options: Any,
    ) -> Iterator[StreamedToken]:
        """Continues one prompt, token by token as they are made.

        The first token comes as soon as the prompt is read. Then every call of the device makes
        several. Images and clips that are made come as `medium` of the token that closes them.

        Args:
          prompt: a text, or ids.
          config: how. None: `options` say.
          tokens_per_call: so many, which come together. None: as many as are made in 50 ms, at
            most 64; one where several processes share a mesh.
          images: as of `generate`.
          clips: as of `generate`.
          **options: as of `generate`.

        Raises:
          UserError: at once, if the prompt or an option cannot be used.

        Examples:
          >>> for token in lm.stream("The ", strategy="greedy", max_new_tokens=2):
          ...     print(token.depth)
          4
          4
        """
        config = _generation(config, options)
        prompts, is_single = _listed(prompt)
        if not is_single:
            raise UserError("stream continues one prompt; for several use generate.")
        prompts = self._with_media(prompts, images, clips)
        generator = self._generator(config)
        generator.check(prompts)
        return generator.stream(prompts[0], tokens_per_call)

    def trace(
        self,
        inputs: Inputs,
        *,
        depth: int | None = None,
        top_k: int | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> Trace:
        """Looks at every iteration of the core: latents, residuals, and what the model would say.

        Args:
          inputs: as in `__call__`.
          depth: iterations; each number compiles once. None: the mean in training.
          top_k: how many of the likeliest next tokens are kept. None: 5, or the whole vocabulary
            if that is smaller.
          seed: of the core's first states.

        Raises:
          UserError: as `__call__`, if the model has no core, or if the trace would fill the memory.

        Examples:
          >>> trace = lm.trace("The ", depth=3, top_k=2)
          >>> trace.latents.shape, trace.residuals.shape, len(trace.next_tokens(3))
          ((3, 1, 3, 64), (3, 1, 3), 2)
        """
        _reject(unknown, ("depth", "top_k", "seed"))
        if not self.config.is_recurrent:
            raise UserError(f"{self.description} has no recurrent core, so nothing to trace.")
        size = self.config.vocab_size
        top_k = min(_TOP_K, size) if top_k is None else as_whole("top_k", top_k, 1, size)
        tokens, segment_ids, lengths = self._encode(inputs)
        steps = typing.cast(int, self._depth(depth))
        check_trace_size(self.config, tokens.shape, steps, top_k)
        with out_of_memory_is_bad_input():
            found = jax.block_until_ready(
                trace_iterations(
                    self._module_for(tokens),
                    self.weights,
                    tokens,
                    segment_ids,
                    _key(seed),
                    depth=steps,
                    top_k=top_k,
                )
            )
        return make_trace(found, tokens, lengths, self.tokenizer)

    def calibrate(self, **options: Any) -> Report:
        """Finds the cheapest threshold of each exit criterion, for exit_threshold="auto".

        The model keeps them. `report.write(folder)` writes them into the folder of its run, where
        `load` finds them, as `megatransformer calibrate` does.

        Args:
          **options: those of `megatransformer calibrate`: accuracy=0.99, depth, criteria=("kl",),
            files, num_batches, sequence_length, batch_size, seed.

        Raises:
          UserError: if an option is not known or does not fit the model, or data cannot be read.

        Examples:
          >>> report = lm.calibrate(criteria=("latent_diff",), num_batches=1, sequence_length=8)
          >>> [row["criterion"] for row in report.rows]
          ['fixed', 'latent_diff']
        """
        from megatransformer_jax.runs.calibrate import calibrate  # noqa: PLC0415

        config = from_options(CalibrationConfig, options)
        with out_of_memory_is_bad_input():
            report, self.calibration = calibrate(self._loaded, config)
        return report

    def quantize(self, **options: Any) -> "Model":
        """The model with matrices of 8 or 4 bits, for inference; this one stays as it is.

        Args:
          **options: those of `megatransformer quantize` that say how: weights="int4", group,
            activations, method="gptq", include, calibration_batches, calibration_files, seed.

        Raises:
          UserError: if an option is not known or does not fit the model, data cannot be read, or
            the extra 'quantization' is missing.

        Examples:
          >>> small = lm.quantize(weights="int4")  # doctest: +SKIP
          >>> small.save("runs/int4")  # doctest: +SKIP
        """
        config = from_options(QuantizationConfig, options)
        with out_of_memory_is_bad_input():
            return Model(quantize_model(self._loaded, config))

    def divergence(self, other: "Model", **options: Any) -> Report:
        """How far another model of the same architecture is from this one, by depth.

        Args:
          other: this model, quantised for example.
          **options: of `mt.evaluate`, on what they are compared: depths, files, num_batches,
            sequence_length, batch_size, seed.

        Raises:
          UserError: if the architectures differ, an option does not fit, or data cannot be read.

        Examples:
          >>> report = lm.divergence(lm, depths=(1, 4), num_batches=1)
          >>> [row["kl"] for row in report.rows]
          [0.0, 0.0]
        """
        if not isinstance(other, Model):
            raise UserError(f"other: {other!r} is not an mt.Model; give one such as lm.quantize().")
        config = from_options(ScoringConfig, options)
        with out_of_memory_is_bad_input():
            return compare_models(self._loaded, other._loaded, config)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        format: str = "run",
        overwrite: bool = False,
        dtype: typing.Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> AnyPath:
        """Writes the model into a folder that `load` reads.

        Args:
          folder: made if absent, with the folders above it; it must be empty.
          format: 'run' is the folder of a run of ours with parameters only, for every model with a
            tokenizer; of a quantised model what `megatransformer quantize` writes. The others are
            of other projects, such as 'huginn', each for models that it can express.
          overwrite: replaces an older export of another project's format.
          dtype: of the exported weights, which rounds them. None: as they are.

        Returns:
          The folder.

        Raises:
          UserError: if the format cannot express the model, or the folder cannot be used.

        Examples:
          >>> mt.load(lm.save(folder / "saved")).config == lm.config
          True
        """
        is_run = format == "run" and self._loaded.quantization is None
        path = as_path("folder", folder, CHECKPOINTS if is_run else (), NO_CHECKPOINTS)
        if format == "run":
            if overwrite or dtype is not None:
                name = "overwrite" if overwrite else "dtype"
                raise ConfigError(name, "is for formats of other projects; leave it out.")
            if is_run:
                save_parameters(self._loaded, path)
            else:
                save_quantized(self._loaded, path)
        elif format in FOREIGN_FORMATS:
            export_model(self._loaded, path, format=format, dtype=dtype, overwrite=overwrite)
        else:
            known = ", ".join(map(repr, ("run", *FOREIGN_FORMATS)))
            raise ConfigError("format", f"{format!r} is unknown; known: {known}.")
        return path

    def _generator(self, config: GenerationConfig) -> Generator:
        return dataclasses.replace(self._loaded, calibration=self.calibration).generator(config)

    def _module_for(self, tokens: Any) -> MegaTransformer:
        """The module, laid out for so many inputs."""
        return for_rows(self.module, len(tokens))

    @property
    def weights(self) -> Any:
        """`params` as passes compute with them: matrices in the type of activations, on the device.

        Rounded when first asked for, and kept. The same arrays if the type is that of `params`.
        """
        return self._loaded.weights

    @property
    def num_parameters(self) -> int:
        """Numbers in `params`."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_quantized_matrix)
        return sum(leaf.size for leaf in leaves)

    def __repr__(self) -> str:
        depth = "no core" if self.trained_depth is None else f"trained depth {self.trained_depth}"
        return f"Model({self.description}: {self.num_parameters:,} parameters, {depth})"

    def _encode(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]:
        """Tokens [B, T], their segments if there is padding, and lengths."""
        given, _ = _listed(inputs)
        rows = encode_prompts(given, self.tokenizer, self.config.vocab_size)
        lengths = tuple(map(len, rows))
        longest, limit = max(lengths), self.config.max_length
        if longest > limit:
            raise UserError(
                f"the longest input has {longest} tokens (the start token of texts included), and "
                f"the model reads at most max_length={limit}; shorten it."
            )
        pad_id = 0 if self.tokenizer is None else self.tokenizer.pad_id
        tokens = np.full((len(rows), longest), pad_id, np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
            segment_ids[row, : len(ids)] = 1
        return tokens, None if min(lengths) == longest else segment_ids, lengths

    def _depth(self, depth: int | None) -> int | None:
        if depth is None:
            return self.trained_depth
        if self.trained_depth is None:
            raise ConfigError("depth", f"{self.description} has no recurrent core; leave it out.")
        return as_whole("depth", depth, 1, MAX_COUNT)

    def _with_media(
        self, prompts: Any, images: Sequence[np.ndarray], clips: Sequence[np.ndarray]
    ) -> Any:
        """The prompts; those with media or markers as prompts of both."""
        rate_hz = self.config.audio.mel.sample_rate_hz
        media: list[ImagePart | AudioPart] = [
            *(ImagePart(image) for image in _arrays("images", images)),
            *(AudioPart(clip, rate_hz) for clip in _arrays("clips", clips)),
        ]
        has_markers = self.config.has_media and any(
            marker in text for text in prompts if isinstance(text, str) for marker in MARKERS
        )
        if not (media or has_markers):
            return prompts
        tokenizer = media_tokenizer(self.config, self.tokenizer, self.description)
        if media and len(prompts) != 1:
            raise UserError(f"images and clips belong to one prompt, not to {len(prompts)}.")
        if media and not isinstance(prompts[0], str):
            raise UserError("images and clips need a prompt of text; give one, maybe an empty one.")
        return [
            prompt_of_text(prompt, media, tokenizer, name=f"prompt {number}")
            if isinstance(prompt, str)
            else prompt
            for number, prompt in enumerate(prompts, 1)
        ]


def _generation(config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    if isinstance(config, GenerationConfig) and options:
        raise UserError(
            f"{next(iter(options))}: give either a GenerationConfig or options, not both."
        )
    if config is not None:
        if not isinstance(config, GenerationConfig):
            raise UserError(
                f"config: {config!r} is not a GenerationConfig; give options by name, depth=16."
            )
        return config
    return GenerationConfig.of(**declared_values(options, GENERATION_OPTIONS))


def _arrays(name: str, media: Any) -> list[np.ndarray]:
    """The media, as they are.

    Raises:
      ConfigError: unless they are several arrays.
    """
    found = [media] if isinstance(media, str) or not isinstance(media, Iterable) else [*media]
    for item in found:
        if not isinstance(item, np.ndarray | jax.Array):
            kind = type(item).__name__
            raise ConfigError(
                name, f"has {kind}; give a list of arrays, float32 in [-1, 1], or leave it out."
            )
    return [np.asarray(item) for item in found]


def _reject(unknown: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in unknown:
        raise unknown_key(name, known)


def _listed(inputs: Any) -> tuple[Any, bool]:
    """Inputs as a sequence of texts or ids, and whether there is one that is not in a list."""
    if isinstance(inputs, jax.core.Tracer):
        raise UserError(
            "inputs are traced: a Model works outside of jax.jit and its like; inside use "
            "model.module.apply({'params': model.params}, tokens, num_steps=depth)."
        )
    if isinstance(inputs, jax.Array):
        inputs = np.asarray(inputs)
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs, np.ndarray) and inputs.ndim > 0:
        return ([inputs], True) if inputs.ndim == 1 else (inputs, False)
    if not isinstance(inputs, Sequence):
        raise UserError(f"{inputs!r} is neither a text nor a sequence of texts or token ids.")
    inputs = [as_python(item) for item in inputs]
    is_ids = len(inputs) > 0 and isinstance(inputs[0], (int, float))
    return ([inputs], True) if is_ids else (inputs, False)


def _key(seed: Any) -> jax.Array:
    return jax.random.key(as_whole("seed", seed, 0, MAX_SEED))


@functools.partial(jax.jit, static_argnames="module")
def _forward(
    module: MegaTransformer,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    depth: jax.Array,
    key: jax.Array,
    readout: GateReadout | None = None,
) -> Any:
    return module.apply(
        {"params": params},
        tokens,
        segment_ids=segment_ids,
        num_steps=depth,
        rngs={"state": key},
        readout=readout,
    )
