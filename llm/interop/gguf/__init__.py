"""GGUF, the files of llama.cpp: metadata, tokenizer and tensors, perhaps quantized, in one file.

`format` and `writing` know the container, `blocks` the quantized types, `architectures` whose tensors and settings are
which of ours, `tokenizer` the vocabularies, and `files` reads and writes whole models.
"""
