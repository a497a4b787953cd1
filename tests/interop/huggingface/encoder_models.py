"""Tiny random encoders and encoder-decoders, made by transformers; see models.py."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.huggingface.models import SIZES, D, F, H, L, V, quiet

BERT = SIZES | {'max_position_embeddings': 40, 'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
T5 = {
    'vocab_size': V,
    'd_model': D,
    'd_kv': 6,
    'd_ff': F,
    'num_layers': 2,
    'num_decoder_layers': L,
    'num_heads': H,
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 20,
    'dropout_rate': 0.0,
    'decoder_start_token_id': 0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers: its class and the settings of its config; whether its embeddings are not tied."""

    architecture: str
    settings: dict[str, Any]
    untied: bool = False

    @property
    def family(self) -> str:
        """As classes of configs are called."""
        return self.architecture.partition('For')[0].removesuffix('Model')


ENCODERS: dict[str, Case] = {
    'bert': Case('BertForMaskedLM', BERT),
    'bert for pretraining': Case('BertForPreTraining', BERT | {'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-3}),
    'bert without head': Case('BertModel', BERT | {'hidden_act': 'relu'}),
    'roberta': Case(
        'RobertaForMaskedLM',
        BERT | {'max_position_embeddings': 42, 'type_vocab_size': 1, 'layer_norm_eps': 1e-5, 'pad_token_id': 1},
    ),
    # Windows of their own in each layer; rows of 16 tokens are padded to 24 there.
    'longformer': Case(
        'LongformerForMaskedLM',
        BERT
        | {
            'max_position_embeddings': 42,
            'type_vocab_size': 1,
            'layer_norm_eps': 1e-5,
            'pad_token_id': 1,
            'attention_window': [8, 4, 8],
        },
    ),
    'albert': Case('AlbertForMaskedLM', BERT | {'embedding_size': 12}),
}
ENCODER_DECODERS: dict[str, Case] = {
    't5': Case('T5ForConditionalGeneration', T5),
    't5 v1.1': Case(
        'T5ForConditionalGeneration',
        T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
        untied=True,
    ),
}
CASES = ENCODERS | ENCODER_DECODERS


@functools.cache
def make(name: str) -> tuple[Any, Path]:
    """The model in float32, and a directory that it was saved to."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, f'{case.family}Config')(**case.settings)
    config._attn_implementation = 'eager'
    torch.manual_seed(0)
    model = getattr(transformers, case.architecture)(config).eval()
    if case.untied:  # transformers 5 ties all embeddings until it loads others
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, D))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        if name == 't5':  # else it says again what it reads
            model.shared.weight.mul_(0.3)
    directory = Path(tempfile.mkdtemp(prefix='huggingface-'))
    with quiet():
        model.save_pretrained(directory)
    return model, directory


def load(directory: Path, architecture: str) -> Any:
    """A model as transformers loads it from a directory, with every tensor of the model in it and no other."""
    import transformers

    with quiet():
        model, report = getattr(transformers, architecture).from_pretrained(
            directory, attn_implementation='eager', output_loading_info=True
        )
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
    return model.eval()


def padded(rows: int = 3, length: int = 16, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [rows, length], the rows of different lengths; and which are real."""
    rng = np.random.default_rng(0)
    real = np.arange(length) < (length - 5 * np.arange(rows))[:, None]
    return np.where(real, rng.integers(3, V, (rows, length)), pad), real
