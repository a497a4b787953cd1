"""BERT's WordPiece (Wu et al. 2016; Devlin et al. 2018) as the tokenizer.json that `tokenizers` makes of it."""

from collections.abc import Mapping, Sequence


def wordpiece_json(
    ids: Mapping[str, int],
    special: Sequence[str],
    *,
    unknown: str = '[UNK]',
    lowercase: bool = True,
    strip_accents: bool | None = None,
    split_chinese: bool = True,
) -> bytes:
    """The content of a tokenizer.json.

    Args:
        ids: by token, those inside a word with '##'.
        special: tokens that no text becomes. With [CLS] and [SEP] among them, every text lies between these.
        unknown: for words that the tokens do not make up.
        strip_accents: None for what `lowercase` says.
        split_chinese: whether each Chinese character is a word.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(dict(ids), unk_token=unknown))
    tokenizer.add_special_tokens(list(special))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if {'[CLS]', '[SEP]'} <= set(special):
        tokenizer.post_processor = processors.TemplateProcessing(
            single='[CLS] $A [SEP]',
            pair='[CLS] $A [SEP] $B:1 [SEP]:1',
            special_tokens=[(name, ids[name]) for name in ('[CLS]', '[SEP]')],
        )
    return tokenizer.to_str().encode()
