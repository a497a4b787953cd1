"""The tensors of GGUF files by architecture, as rows of `llm.interop.tables`. Source: llama.cpp's `constants.py`.

Llama's queries and keys are stored for rotation of neighbours: a head's halves are interleaved. Gemma's norms are
stored with their 1, rates of Mamba as rates and not as logarithms, experts of a layer in one tensor.
"""

from collections.abc import Mapping

from llm.interop.tables import Row

LAYER = 'blk.{layer}'
PRE_NORMS = {'mixer_norm': 'attn_norm', 'feed_forward_norm': 'ffn_norm'}
QK_NORMS = {'mixer/query_norm': 'attn_q_norm', 'mixer/key_norm': 'attn_k_norm'}
OUTPUT_NORMS = {'mixer_output_norm': 'post_attention_norm', 'feed_forward_output_norm': 'post_ffw_norm'}
_QKV = ('mixer/query', 'mixer/key', 'mixer/value')


def _rows(names: Mapping[str, str], axes: str = '', bias: str = '', beside: str | None = None) -> tuple[Row, ...]:
    """Matrices and their biases: our path -> their name within a layer."""
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (
            Row(ours, f'{LAYER}.{theirs}.weight', axes, beside=beside),
            Row(f'{ours}_bias', f'{LAYER}.{theirs}.bias', bias, beside=beside),
        )
    )


def norm_rows(names: Mapping[str, str], offset: float = 0.0, axes: str = '') -> tuple[Row, ...]:
    """Norms: our path -> their name within a layer."""
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (
            Row(f'{ours}/scale', f'{LAYER}.{theirs}.weight', axes, offset),
            Row(f'{ours}/bias', f'{LAYER}.{theirs}.bias'),
        )
    )


def _outside(offset: float = 0.0) -> tuple[Row, ...]:
    return (
        Row('embedding/table', 'token_embd.weight'),
        Row('final_norm/scale', 'output_norm.weight', '', offset),
        Row('final_norm/bias', 'output_norm.bias'),
        Row('head/kernel', 'output.weight', 'V D -> D V'),
    )


_NETWORK = (
    *_rows({'feed_forward/gate': 'ffn_gate', 'feed_forward/up': 'ffn_up'}, 'F D -> D F'),
    *_rows({'feed_forward/down': 'ffn_down'}, 'D F -> F D'),
    Row('feed_forward/router/kernel', f'{LAYER}.ffn_gate_inp.weight', 'E D -> D E'),
    Row('feed_forward/experts/gate', f'{LAYER}.ffn_gate_exps.weight', 'E F D -> E D F'),
    Row('feed_forward/experts/up', f'{LAYER}.ffn_up_exps.weight', 'E F D -> E D F'),
    Row('feed_forward/experts/down', f'{LAYER}.ffn_down_exps.weight', 'E D F -> E F D'),
    *_rows({'feed_forward/shared/gate': 'ffn_gate_shexp', 'feed_forward/shared/up': 'ffn_up_shexp'}, 'F D -> D F'),
    *_rows({'feed_forward/shared/down': 'ffn_down_shexp'}, 'D F -> F D'),
)
_ATTENTION_OUTPUT = _rows({'mixer/output': 'attn_output'}, 'D (H K) -> H K D', beside='mixer/query')
_FUSED_ATTENTION = (
    Row(_QKV, f'{LAYER}.attn_qkv.weight', '(* H K) D -> D H K'),
    Row(tuple(f'{name}_bias' for name in _QKV), f'{LAYER}.attn_qkv.bias', '(* H K) -> H K'),
    *_ATTENTION_OUTPUT,
)


def _attention(*, interleaved: bool = False) -> tuple[Row, ...]:
    size, ours = ('k 2', '(2 k)') if interleaved else ('K', 'K')
    return (
        *_rows({'mixer/query': 'attn_q'}, f'(H {size}) D -> D H {ours}', f'(H {size}) -> H {ours}'),
        *_rows({'mixer/key': 'attn_k'}, f'(G {size}) D -> D G {ours}', f'(G {size}) -> G {ours}'),
        *_rows({'mixer/value': 'attn_v'}, '(G K) D -> D G K', '(G K) -> G K'),
        *_ATTENTION_OUTPUT,
    )


def llama_like(norms: Mapping[str, str], *, interleaved: bool = False, offset: float = 0.0) -> tuple[Row, ...]:
    """Tensors with Llama's names, of feed-forward layers or of experts, gated or not."""
    return (*_outside(offset), *_attention(interleaved=interleaved), *_NETWORK, *norm_rows(norms, offset))


_MAMBA_AROUND = (
    Row('mixer/dt_bias', f'{LAYER}.ssm_dt.bias'),
    Row('mixer/output', f'{LAYER}.ssm_out.weight', 'D F -> F D', beside='mixer/dt_down'),
    Row('mixer/output', f'{LAYER}.ssm_out.weight', 'D (H K) -> H K D', beside='mixer/dt'),
    Row('mixer/output_bias', f'{LAYER}.ssm_out.bias', beside='mixer/a_log'),
)
_MAMBA = (
    *_MAMBA_AROUND,
    Row(('mixer/input', 'mixer/gate'), f'{LAYER}.ssm_in.weight', '(* F) D -> D F'),
    Row(('mixer/input_bias', 'mixer/gate_bias'), f'{LAYER}.ssm_in.bias', '(* F) -> F'),
    Row('mixer/convolution', f'{LAYER}.ssm_conv1d.weight', 'F W -> W F'),
    Row('mixer/convolution_bias', f'{LAYER}.ssm_conv1d.bias'),
    Row(('mixer/dt_down', 'mixer/b', 'mixer/c'), f'{LAYER}.ssm_x.weight', '(* N) F -> F N'),
    Row('mixer/dt_up', f'{LAYER}.ssm_dt.weight', 'F R -> R F'),
    Row('mixer/a_log', f'{LAYER}.ssm_a', rate=True),
    Row('mixer/skip', f'{LAYER}.ssm_d'),
)
_CONVOLVED = ('input', 'b', 'c')


def _parts(*names: str, ending: str = '') -> tuple[str, ...]:
    return tuple(f'mixer/{name}{ending}' for name in names)


FUSED = (*_outside(), *_FUSED_ATTENTION, *_NETWORK, *norm_rows(PRE_NORMS))
GPT2 = (*FUSED, Row('positions/table', 'position_embd.weight'))
PHI3 = (
    *(row for row in FUSED if row.ours not in ('feed_forward/gate', 'feed_forward/up')),
    Row(('feed_forward/gate', 'feed_forward/up'), f'{LAYER}.ffn_up.weight', '(* F) D -> D F'),
)
QK_NORMS_OF_ALL_HEADS = (
    Row('mixer/query_norm/scale', f'{LAYER}.attn_q_norm.weight', '(H K) -> H K'),
    Row('mixer/key_norm/scale', f'{LAYER}.attn_k_norm.weight', '(G K) -> G K'),
)
OLMO2 = (*llama_like(OUTPUT_NORMS), *QK_NORMS_OF_ALL_HEADS)
OLMOE = (*llama_like(PRE_NORMS), *QK_NORMS_OF_ALL_HEADS)
MAMBA = (*_outside(), *_MAMBA, *norm_rows({'mixer_norm': 'attn_norm'}))
# groups: those of the norm, a number; see Architecture.rows.
MAMBA2 = (
    *_outside(),
    *norm_rows({'mixer_norm': 'attn_norm'}),
    *_MAMBA_AROUND,
    Row(_parts('gate', *_CONVOLVED, 'dt'), f'{LAYER}.ssm_in.weight', '(* ...) D -> D ...'),
    Row(_parts('gate', *_CONVOLVED, 'dt_projection', ending='_bias'), f'{LAYER}.ssm_in.bias', '(* ...) -> ...'),
    Row(_parts(*_CONVOLVED, ending='_convolution'), f'{LAYER}.ssm_conv1d.weight', '(* ...) W -> W ...'),
    Row(_parts(*_CONVOLVED, ending='_convolution_bias'), f'{LAYER}.ssm_conv1d.bias', '(* ...) -> ...'),
    Row('mixer/a_log', f'{LAYER}.ssm_a', 'H 1 -> H', rate=True),
    Row('mixer/skip', f'{LAYER}.ssm_d', 'H 1 -> H'),
    Row('mixer/norm_scale', f'{LAYER}.ssm_norm.weight', 'groups (h K) -> (groups h) K'),
)
JAMBA = (
    *llama_like(PRE_NORMS),
    *_MAMBA,
    *norm_rows({f'mixer/{name}_norm': f'ssm_{name}_norm' for name in ('dt', 'b', 'c')}),
)
DEEPSEEK2 = (
    *_outside(),
    *_NETWORK,
    *norm_rows(PRE_NORMS | {'mixer/query_norm': 'attn_q_a_norm', 'mixer/latent_norm': 'attn_kv_a_norm'}),
    Row('mixer/query', f'{LAYER}.attn_q.weight', '(H K) D -> D H K'),
    Row('mixer/query_down', f'{LAYER}.attn_q_a.weight', 'R D -> D R'),
    Row('mixer/query_up', f'{LAYER}.attn_q_b.weight', '(H K) R -> R H K'),
    Row(('mixer/latent', 'mixer/rotary_key'), f'{LAYER}.attn_kv_a_mqa.weight', '(* R) D -> D R'),
    Row('mixer/key', f'{LAYER}.attn_k_b.weight', 'H R K -> R H K'),
    Row('mixer/value', f'{LAYER}.attn_v_b.weight', 'H K R -> R H K'),
    Row('mixer/output', f'{LAYER}.attn_output.weight', 'D (H K) -> H K D'),
)
# The norms of StableLM 2 12B are one for each head.
STABLELM = (*llama_like(PRE_NORMS), *norm_rows(QK_NORMS, axes='H K -> H K'))
