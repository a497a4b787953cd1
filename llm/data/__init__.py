"""From documents to batches: sources, vocabularies, the token cache, packing and the loader.

TensorFlow, through SeqIO, is imported by functions here that read a SeqIO task, never when a module is loaded.
"""
