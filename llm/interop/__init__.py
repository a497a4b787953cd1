"""Models in other people's formats, to and from our parameters.

`tables` says how the tensors of a format and our parameters correspond, once for both directions; `safetensors` reads
and writes files; `loading` puts a checkpoint onto a mesh; `huggingface` knows the families of models.
"""
