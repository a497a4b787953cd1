"""A JAX codebase for making language models: data, training, alignment, compression, evaluation and serving."""
