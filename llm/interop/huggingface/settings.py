"""A config.json being read: every setting is taken by name, and one that nobody takes is an error.

A setting that is not understood may change what the model computes, so it is refused rather than passed over.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm.errors import UserError

T = TypeVar('T', bool, int, float, str)
C = TypeVar('C')

# What changes neither shapes nor logits: how a model was trained or made, is run, or is told where a text ends.
HARMLESS = frozenset(
    (
        *('_name_or_path', 'architectures', 'model_type', 'transformers_version', 'auto_map', 'name_or_path'),
        *('dtype', 'torch_dtype', 'use_cache', 'cache_implementation', 'attn_implementation', '_attn_implementation'),
        *(
            'bos_token_id',
            'eos_token_id',
            'pad_token_id',
            'unk_token_id',
            'sep_token_id',
            'decoder_start_token_id',
            'is_decoder',
        ),
        *('initializer_range', 'attention_dropout', 'hidden_dropout', 'resid_pdrop', 'embd_pdrop', 'attn_pdrop'),
        *(
            'residual_dropout',
            'embedding_dropout',
            'classifier_dropout',
            'gradient_checkpointing',
            'task_specific_params',
        ),
        *('id2label', 'label2id', 'problem_type', 'return_dict', 'output_attentions', 'output_hidden_states'),
        *('torchscript', 'use_bfloat16', 'pruned_heads', 'chunk_size_feed_forward', 'finetuning_task', 'prefix'),
        *(
            'tokenizer_class',
            'remove_invalid_values',
            'keys_to_ignore_at_inference',
            'tf_legacy_loss',
            'return_dict_in_generate',
        ),
        *('num_logits_to_keep', 'exponential_decay_length_penalty', 'suppress_tokens', 'begin_suppress_tokens'),
    )
)
# Settings of the model's text generation, which older checkpoints kept here.
_GENERATION = frozenset(
    (
        *(
            'max_length',
            'min_length',
            'do_sample',
            'early_stopping',
            'num_beams',
            'num_beam_groups',
            'diversity_penalty',
        ),
        *('temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size'),
        *(
            'encoder_no_repeat_ngram_size',
            'bad_words_ids',
            'num_return_sequences',
            'output_scores',
            'forced_bos_token_id',
        ),
        'forced_eos_token_id',
    )
)


# What we make as many objects of, before anything shows that the tensors are not so many.
_COUNTED = (
    *('num_hidden_layers', 'n_layer', 'num_attention_heads', 'n_head', 'num_key_value_heads'),
    *('num_experts', 'num_local_experts', 'n_routed_experts'),
    *('num_layers', 'num_decoder_layers', 'num_heads'),  # T5
)
_MOST = 10_000


class Settings:
    """The settings of one config.json; those taken are noted.

    Args:
        content: the JSON object.
        where: the file, for messages.
        ignored: names that the user says to pass over.
    """

    def __init__(self, content: Mapping[str, Any], where: str | Path, ignored: tuple[str, ...] = ()) -> None:
        self._content, self.where = content, str(where)
        self._known = set(HARMLESS | _GENERATION | set(ignored))

    def __contains__(self, name: str) -> bool:
        return self._content.get(name) is not None

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The value of a setting; null counts as missing.

        Raises:
            UserError: it is missing and has no default, or is of another type.
        """
        value = self.optional(name, kind)
        if value is not None:
            return value
        if default is None:
            raise UserError(f'{name} is missing', where=self.where, fix='Use the config.json of the checkpoint.')
        return default

    def optional(self, name: str, kind: type[T], missing: T | None = None) -> T | None:
        """The value of a setting that may be null, or `missing`."""
        self._known.add(name)
        value = self._content.get(name, missing)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.unsupported(name, f'not of type {kind.__name__}')
        if isinstance(value, float) and not math.isfinite(value):
            raise self.unsupported(name, 'not a finite number')
        if name in _COUNTED and not 1 <= int(value) <= _MOST:
            raise self.unsupported(name, f'use from 1 to {_MOST:,}')
        return value

    def raw(self, name: str) -> Any:
        """A setting that is a list or an object, or None."""
        self._known.add(name)
        return self._content.get(name)

    def expect(self, **values: Any) -> None:
        """Take settings that only one value of is supported, or none at all.

        Raises:
            UserError: one has another value.
        """
        for name, wanted in values.items():
            self._known.add(name)
            if self._content.get(name, wanted) not in (wanted, None):
                raise self.unsupported(name, f'only {wanted!r} is supported')

    def choose(self, name: str, choices: Mapping[str, C], default: str) -> C:
        """What a setting means to us, of the values that are supported."""
        value = self.take(name, str, default)
        if value not in choices:
            raise self.unsupported(name, f'supported are {", ".join(choices)}')
        return choices[value]

    def whole_heads(self, width: int, heads: int) -> int:
        """The size of a head where it follows from width and heads."""
        if heads < 1 or width % heads:
            raise UserError(
                f'{heads} attention heads do not divide the width {width}',
                where=self.where,
                fix='Use the config.json of the checkpoint.',
            )
        return width // heads

    def pass_over(self, *names: str) -> None:
        """Know settings that say nothing that matters here."""
        self._known.update(names)

    def unsupported(self, name: str, why: str) -> UserError:
        """The error for a value that cannot be had."""
        return UserError(
            f'{name} is {self._content.get(name)!r:.80}: {why}',
            where=self.where,
            fix='This model cannot be converted as it is.',
        )

    def finish(self) -> None:
        """Refuse what nobody has taken.

        Raises:
            UserError: naming the settings.
        """
        unknown = sorted(name for name in self._content if name not in self._known)
        if unknown:
            raise UserError(
                f'unknown settings: {", ".join(f"{name} = {self._content[name]!r:.40}" for name in unknown[:5])}',
                where=self.where,
                fix='If they do not change what the model computes, name them in Convert.ignored_settings.',
            )
