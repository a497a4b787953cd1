"""A trained model as a program of another runtime: ONNX, TensorFlow SavedModel, StableHLO.

`signatures` says once what programs a model has, with their arrays; a file for each format writes them, and `manifest`
describes what was written. Heavy packages (jax2onnx, TensorFlow) are imported where they are used, and only then.
"""
