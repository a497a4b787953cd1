"""N-gram language models: `estimating` makes one of texts, `arpa` reads those of others, `model` scores documents."""

from llm.data.documents.ngram_models.model import NgramModel, load_ngram_model

__all__ = ['NgramModel', 'load_ngram_model']
