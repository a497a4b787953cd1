"""Which documents, lines and passages have been there before, and which must not be trained on.

`words` turns texts into hashes of words and n-grams; `minhash` into signatures and bands; `near_duplicates` finds and
verifies pairs, `components` joins them; `exact` and `repeats` find what is equal; `decontamination` what evaluation
sets hold. All of these are functions of documents, or of keyed groups in sorted arrays. `sorted_runs` keeps keyed
records on disk, `corpus` numbers documents, `scan` and `shards` do one shard, `pipeline` runs the phases over all, and
`verdicts` writes what is left.
"""
