"""The families of Hugging Face models that can be read and written.

To add one: a file beside this one with its table, `read` and `write` (see `family.Family`), a line here, and a line in
tests/interop/huggingface/models.py, which then holds it to transformers.
"""

from llm.interop.huggingface.family import Family
from llm.interop.huggingface.gpt2 import GPT2
from llm.interop.huggingface.llama import LLAMA

# When a model is written, the first that can describe it is taken.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, GPT2)}
