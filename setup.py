"""Packaging. `pip install -e .[dev]` is the whole set-up."""

from setuptools import find_packages, setup

setup(
    name="megatransformer_jax",
    version="0.1.0",
    description="Depth-recurrent transformers in JAX",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatransformer_jax*", "experiments*"]),
        "megatransformer_jax.gin",
    ],
    # The presets live at the top level of the repository and inside the package once installed.
    package_dir={"megatransformer_jax.gin": "gin"},
    package_data={"megatransformer_jax.gin": ["*.gin"]},
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "flax>=0.12,<0.13",
        "gin-config>=0.5,<0.6",
        "grain>=0.2.18,<0.3",
        "jax>=0.10,<0.11",
        "jaxtyping>=0.3,<0.4",
        "matplotlib>=3.8,<4",
        "ml_collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pyarrow>=18",
        "pyyaml>=6,<7",
        "rich>=13",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6,<3",
    ],
    extras_require={
        "tfds": ["tensorflow-datasets>=4.9.9,<5"],
        "wandb": ["wandb>=0.18"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "cuda": ["jax[cuda13]>=0.10,<0.11"],
        "dev": [
            "tensorflow-datasets>=4.9.9,<5",
            "hypothesis>=6.100",
            "ipykernel>=6",
            "mypy>=1.14",
            "nbclient>=0.10",
            "nbformat>=5",
            "pre-commit>=4",
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "tensorboard>=2.18",
            "beartype>=0.19",
            "types-PyYAML",
        ],
    },
)
