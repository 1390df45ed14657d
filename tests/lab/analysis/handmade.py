"""Models whose heads do what they were built to do."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, POSITIONS, WIDTH, HEADS = 48, 64, 128, 6
FIRST, LAST = 11, VOCAB  # tokens of ordinary text
# The ones look for the others. Several: a random head may well prefer one word to all others.
DEPENDENTS, HEAD_WORDS = [3, 4, 5, 6], [7, 8, 9, 10]
# Where in the residual stream a token is written, its position, and the token before it.
TOKEN, POSITION, BEFORE = (slice(0, 48), slice(48, 112), slice(112, 160))
ROLES = {
    (0, 0): "previous_token",
    (0, 1): "first_token",
    (0, 2): "positional",
    (0, 3): "broadcast",
    (0, 4): "duplicate_token",
    (0, 5): "mixed",
    (1, 0): "induction",
    (1, 1): "syntactic",
    (1, 2): "broadcast",
    (1, 3): "mixed",
    (1, 4): "positional",
    (1, 5): "mixed",
}
OFFSETS = {(0, 2): -3, (1, 4): 0}


@torch.no_grad()
def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    """Two layers of six heads, with `ROLES`; induction is composed with head 0.0.

    Tokens and positions are one-hot. Random heads: 0.5, 1.3 and 1.5 with large weights, 1.2 with
    those of a fresh model.
    """
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HEADS * WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=POSITIONS,
        n_inner=4,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).eval()
    model.set_attn_implementation(attention)
    for parameter in model.transformer.parameters():
        parameter.zero_()
    model.transformer.wte.weight[:, TOKEN] = torch.eye(VOCAB)
    model.transformer.wpe.weight[:, POSITION] = torch.eye(POSITIONS)
    for block in model.transformer.h:
        block.ln_1.weight.fill_(1.0)
    model.transformer.ln_f.weight.fill_(1.0)

    def shifted(by: int) -> torch.Tensor:
        return torch.eye(POSITIONS)[(torch.arange(POSITIONS) - by).clamp(min=0)]

    def query(layer: int, head: int, source: slice, to: int, matrix: torch.Tensor) -> None:
        _write(model, layer, head, 0, source, to, matrix)

    def key(layer: int, head: int, source: slice, to: int, matrix: torch.Tensor) -> None:
        _write(model, layer, head, 1, source, to, matrix)

    tokens, places = torch.eye(VOCAB), torch.eye(POSITIONS)
    for layer, head, by in ((0, 0, 1), (0, 2, 3), (1, 4, 0)):
        query(layer, head, POSITION, 0, shifted(by))
        key(layer, head, POSITION, 0, places)
    query(0, 1, POSITION, 0, shifted(POSITIONS))
    key(0, 1, POSITION, 0, places)
    query(0, 4, TOKEN, 0, tokens)
    key(0, 4, TOKEN, 0, tokens)
    query(0, 4, POSITION, VOCAB, places)  # so that no token finds itself
    key(0, 4, POSITION, VOCAB, -2 * places)
    query(1, 0, TOKEN, 0, tokens)
    key(1, 0, BEFORE, 0, tokens)
    query(1, 1, TOKEN, 0, tokens[:, DEPENDENTS].sum(1, keepdim=True))
    key(1, 1, TOKEN, 0, tokens[:, HEAD_WORDS].sum(1, keepdim=True))
    noise = torch.Generator().manual_seed(0)
    for layer, head, size in ((0, 5, 0.1), (1, 3, 0.1), (1, 5, 0.1), (1, 2, 0.001)):
        everything = slice(0, HEADS * WIDTH)
        for role in range(2):
            matrix = torch.randn(HEADS * WIDTH, WIDTH, generator=noise) * size
            _write(model, layer, head, role, everything, 0, matrix)
    # Head 0.0 writes the token it finds.
    _write(model, 0, 0, 2, TOKEN, 0, tokens * (2 / (HEADS * WIDTH)) ** 0.5)
    model.transformer.h[0].attn.c_proj.weight[0:VOCAB, BEFORE] = tokens
    return model


def _write(
    model: GPT2LMHeadModel,
    layer: int,
    head: int,
    role: int,
    source: slice,
    to: int,
    matrix: torch.Tensor,
) -> None:
    """Map a part of the residual stream into a head's query (0), key (1) or value (2)."""
    start = role * HEADS * WIDTH + head * WIDTH + to
    weight = model.transformer.h[layer].attn.c_attn.weight
    weight[source, start : start + matrix.shape[1]] += matrix


@torch.no_grad()
def rotary(attention: str = "sdpa") -> LlamaForCausalLM:
    """One layer, two query heads on one KV head: RoPE turns them to the last token but 1 and 2."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:, 0] = 1.0
    block = model.model.layers[0].self_attn
    for projection in (block.q_proj, block.k_proj):
        projection.weight.zero_()
    turns = model.model.rotary_emb.inv_freq
    for head, distance in enumerate((1, 2)):
        phase = -turns * distance
        wave = torch.cat([phase.cos(), phase.sin()])
        block.q_proj.weight[head * 64 : (head + 1) * 64, 0] = 2 * wave
    block.k_proj.weight[:32, 0] = 1.0
    return model


def text(windows: int = 8, length: int = POSITIONS, seed: int = 0) -> torch.Tensor:
    """[windows, length] of ordinary tokens, evenly drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST, LAST, (windows, length), generator=generator)
