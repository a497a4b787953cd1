"""Linear classifiers of documents: hashed n-grams as features, models in a directory, rules that `Rules` applies.

`features` makes texts sparse vectors, `model` scores them in NumPy alone (workers import no JAX), `rules` has the sets
of rules, `examples` reads labelled documents into files that training draws batches from.
"""
