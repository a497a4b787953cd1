"""Hugging Face checkpoints: a directory with config.json, safetensors and tokenizer files.

`families` lists the architectures; each has a file that says how its config.json and its tensors are ours. `directory`
reads and writes whole checkpoints.
"""
