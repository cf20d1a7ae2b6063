"""Programs that find no package of any extra, as after the base install."""

import subprocess
import sys
from collections.abc import Iterable

# Modules that the base install does not bring, neither itself nor through what it brings.
OF_EXTRAS = (
    "librosa",
    "sklearn",
    "soundfile",
    "soxr",
    "pyarrow",
    "tensorflow_datasets",
    "lm_eval",
    "jiwer",
    "pesq",
    "pystoi",
    "rouge_score",
    "sacrebleu",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "qwix",
    "wandb",
    "gcsfs",
    "s3fs",
    "prometheus_client",
    "starlette",
    "uvicorn",
)
# Whatever a finder does not find is as good as not installed.
_HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without(
    names: Iterable[str], code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code that cannot import `names`, with `arguments` in `sys.argv[1:]`."""
    return subprocess.run(
        [sys.executable, "-c", _HIDE.format(names=set(names)) + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
