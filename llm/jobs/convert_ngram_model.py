"""The convert_ngram_model job: an ARPA file to the directory of an n-gram model, and back."""

import dataclasses
import shutil
from pathlib import Path

from llm.configuration import Invocation
from llm.data.documents.ngram_models.arpa import read_arpa, write_arpa
from llm.data.documents.ngram_models.model import DESCRIPTION, check_content, load_ngram_model
from llm.data.documents.ngram_models.tokens import TokenConfig
from llm.data.vocabularies import load_vocabulary
from llm.errors import UserError
from llm.parallel.processes import require_one


@dataclasses.dataclass(frozen=True)
class ConvertNgramModel:
    """An n-gram model from one form to the other.

    Args:
        source: an ARPA file (plain, .gz, .zst or .bz2), or a directory that train_ngram_model or this job wrote.
        output: a new directory for the one, a new ARPA file for the other.
        tokens: how texts become the tokens of an ARPA file; a directory knows.
        vocabulary: for tokens of that kind: a vocabulary as `load_vocabulary` reads it, whose tokens the file names;
            of SentencePiece by its pieces.
    """

    source: str
    output: str
    tokens: TokenConfig = TokenConfig('white_space')
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        if (self.vocabulary is not None) != (self.tokens.kind == 'vocabulary'):
            raise UserError(
                f'vocabulary = {self.vocabulary!r} does not go with tokens of kind {self.tokens.kind!r}',
                where='ConvertNgramModel',
                fix="Give a vocabulary, and TokenConfig.kind = 'vocabulary', or neither.",
            )

    def __call__(self, invocation: Invocation) -> None:
        """Convert; or say what would be done."""
        source, output = Path(self.source).expanduser(), Path(self.output).expanduser()
        if invocation.dry_run:
            print(f'would convert {source} to {output}')
            return
        require_one('convert_ngram_model')
        if (output.is_dir() and any(output.iterdir())) or output.is_file():
            raise UserError('is there already', where=str(output), fix='Choose another name, or delete it.')
        if source.is_dir():
            check_content(str(source))
            write_arpa(load_ngram_model(str(source)), output)
        else:
            vocabulary = None if self.vocabulary is None else load_vocabulary(self.vocabulary)
            try:
                read_arpa(self.source, output, self.tokens, vocabulary)
            except BaseException:
                shutil.rmtree(output, ignore_errors=True)  # half a model is in the way of the next attempt
                raise
            counts = load_ngram_model(str(output)).facts['ngrams']
            print(', '.join(f'{count:,} {n}-grams' for n, count in enumerate(counts, start=1)))
            output /= DESCRIPTION
        print(f'{output}: written')
