"""English prose that every CPython carries: the help texts of the language reference."""

from pydoc_data.topics import topics

from megatransformer_jax.data.sources.record import BadRecord


class EmbeddedText:
    """The documents of `pydoc_data.topics`, about 80, in the order of their names."""

    def __init__(self) -> None:
        self._texts = [topics[name] for name in sorted(topics)]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str | BadRecord:
        return self._texts[index]
