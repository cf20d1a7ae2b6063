"""Packaging. The base is what training, evaluating and generating text needs."""

from setuptools import find_packages, setup

JAX_VERSIONS = ">=0.10,<0.13"
QWIX = "qwix>=0.1.8,<0.2"

# What an option or a command needs besides; megatransformer_jax/extras.py says so where it lacks.
EXTRAS = {
    "media": [
        "librosa>=0.11,<0.12",
        "scikit-learn>=1.5,<2",
        "soundfile>=0.13,<0.15",
        "soxr>=0.3,<2",
    ],
    "eval": [
        "jiwer>=4,<5",
        "lm-eval>=0.4.13,<0.5",
        "pesq>=0.0.4,<0.1",
        "pystoi>=0.4,<0.5",
        "rouge-score>=0.1.2,<0.2",
        "sacrebleu>=2.6,<3",
    ],
    # Tokenizers and chat templates of published models, and models by their names on the hub.
    "hub": ["huggingface-hub>=1,<3", "jinja2>=3.1.6,<4", "tokenizers>=0.20,<1"],
    # Not jax2onnx, which pins orbax-checkpoint below what the base needs.
    "export": ["onnx>=1.20,<2", "onnxruntime>=1.30,<2"],
    "huginn": ["tokenizers>=0.20,<1"],
    "parquet": ["pyarrow>=18"],
    # Buckets. google-cloud-storage is what Orbax asks about a bucket.
    "gcs": ["gcsfs>=2026.9,<2027", "google-cloud-storage>=3.14.1,<4"],
    # aiobotocore: without a lower bound pip tries its hundreds of versions.
    "s3": ["aiobotocore>=3.10,<4", "s3fs>=2026.9,<2027"],
    "serve": ["prometheus-client>=0.21,<1", "starlette>=1.6,<2", "uvicorn>=0.40,<1"],
    "qlora": [QWIX],
    "quantization": [QWIX],
    "tfds": ["tensorflow-datasets>=4.9.9,<5"],
    "wandb": ["wandb>=0.18"],
    "tpu": [f"jax[tpu]{JAX_VERSIONS}"],
    "cuda": [f"jax[cuda13]{JAX_VERSIONS}"],
    # MkDocs 2 has neither plugins nor themes of this kind.
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.6,<10",
        "mkdocstrings[python]>=1,<2",
    ],
}

IN_DEV = (
    "media",
    "parquet",
    "tfds",
    "eval",
    "hub",
    "qlora",
    "export",
    "serve",
    "gcs",
    "s3",
    "docs",
)
TEST = ["beartype>=0.19", "pytest>=8", "pytest-xdist>=3"]

setup(
    name="megatransformer_jax",
    version="0.2.0",
    description="Depth-recurrent transformers in JAX",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatransformer_jax*"]),
        "megatransformer_jax.gin",
        "megatransformer_jax.experiments",
    ],
    # Presets and experiments live at the top level of the repository, and inside the package once
    # it is installed.
    package_dir={
        "megatransformer_jax.gin": "gin",
        "megatransformer_jax.experiments": "experiments/configs",
    },
    package_data={
        "megatransformer_jax.gin": ["*.gin"],
        "megatransformer_jax.serving": ["playground/*"],
    },
    entry_points={"console_scripts": ["megatransformer = megatransformer_jax.cli.commands:main"]},
    install_requires=[
        "absl-py>=2.1",
        "flatbuffers>=24.3",  # jax.export writes and reads its artifacts with it.
        "flax>=0.12,<0.13",
        "gin-config>=0.5,<0.6",
        "grain>=0.2.18,<0.3",
        f"jax{JAX_VERSIONS}",
        "jaxtyping>=0.3,<0.4",
        "matplotlib>=3.8,<4",
        "ml_collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11",
        "pyyaml>=6,<7",
        "rich>=13",
        "safetensors>=0.8,<1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6,<3",
    ],
    extras_require={
        **EXTRAS,
        # Enough for `make smoke`, which tests the base.
        "test": TEST,
        # Everything but accelerators and services, and what checks the code.
        "dev": [
            *(line for name in IN_DEV for line in EXTRAS[name]),
            *TEST,
            "gcp-storage-emulator>=2026.7,<2027",
            "hypothesis>=6.100",
            "ipykernel>=6",
            "moto[s3,server]>=5.2.5,<6",
            "mypy>=1.14",
            "nbclient>=0.10",
            "nbformat>=5",
            "openai>=3,<4",
            "playwright>=1.50,<2",
            "pre-commit>=4",
            "ruff>=0.9",
            "schemathesis>=4.30,<5",
            "tenacity>=9,<10",  # lm-eval's models over HTTP need it.
            "tensorboard>=2.18",
            "torch>=2.13,<2.14",
            "transformers>=5.23,<6",
            "types-PyYAML",
        ],
    },
)
