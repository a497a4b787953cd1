"""From raw sources to clean documents: readers, stages that judge and rewrite, a runner, a ledger of every decision.

`document` says what a document is; `sources/` reads them; `stage` says what a stage is, a pure function of documents,
and puts them in a row; `shard_processing` does one input shard; `runner` does all of them in processes and adds up.
"""
