"""From raw sources to clean documents: readers, stages that judge and rewrite, a runner, and a ledger of every decision.

`document` says what a document is; `sources/` reads them; a stage (`stage`) is a pure function of documents; `chain`
puts stages in a row; `shard_processing` does one input shard; `runner` does all of them in processes and adds up.
"""
