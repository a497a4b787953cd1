"""The families of Hugging Face models that can be read and written.

To add one: a file beside this one with its table, `read` and `write` (see `family.Family`), a line here, and a line in
tests/interop/huggingface/models.py (or encoder_models.py), which then holds it to transformers.
"""

from llm.interop.huggingface.albert import ALBERT
from llm.interop.huggingface.bert import BERT, ROBERTA
from llm.interop.huggingface.deepseek_v2 import DEEPSEEK_V2
from llm.interop.huggingface.experts import MIXTRAL, OLMOE, QWEN3_MOE
from llm.interop.huggingface.family import Family
from llm.interop.huggingface.gemma import GEMMA2, GEMMA3
from llm.interop.huggingface.gpt2 import GPT2
from llm.interop.huggingface.gpt_neox import GPT_NEOX
from llm.interop.huggingface.jamba import JAMBA
from llm.interop.huggingface.llama import LLAMA
from llm.interop.huggingface.longformer import LONGFORMER
from llm.interop.huggingface.mamba import MAMBA, MAMBA2
from llm.interop.huggingface.mistral import MISTRAL
from llm.interop.huggingface.olmo2 import OLMO2
from llm.interop.huggingface.phi3 import PHI3
from llm.interop.huggingface.qwen import QWEN2, QWEN3
from llm.interop.huggingface.smollm3 import SMOLLM3
from llm.interop.huggingface.stablelm import STABLELM
from llm.interop.huggingface.starcoder2 import STARCODER2
from llm.interop.huggingface.t5 import T5

# When a model is written, the first that can describe it is taken.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GPT2, GPT_NEOX, GEMMA2, GEMMA3, OLMO2, STABLELM, STARCODER2, PHI3),
        *(MIXTRAL, OLMOE, QWEN3_MOE, DEEPSEEK_V2, MAMBA, MAMBA2, JAMBA),
        *(BERT, ROBERTA, ALBERT, LONGFORMER, T5),
    )
}
