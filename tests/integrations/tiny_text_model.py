"""A tiny Llama with a tiny tokenizer of its own, as a model directory, and a text that it can read."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 160
POSITIONS = 320
_WORDS = (
    *("the", "a", "river", "house", "night", "window", "old", "young", "walked", "looked", "stood", "said"),
    *("and", "then", "was", "into", "over", "under", "light", "rain"),
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def text(words: int = 1000, seed: int = 0) -> str:
    """Words in an order that the seed gives."""
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


def write_novel(directory: Path) -> Path:
    """A file of other text than what the tokenizer learns from."""
    path = directory / "novel.txt"
    path.write_text(text(seed=1), encoding="utf-8")
    return path


def write_tokenizer(directory: Path, *, begins: bool = False, template: str | None = None, learned: str = "") -> None:
    """A byte-level BPE of ``VOCABULARY`` tokens.

    Args:
        begins: whether it puts ``<s>`` before a text.
        learned: what its tokens come from; :func:`text` by default.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) & set(map(chr, range(33, 127))) | {"Ġ", "Ċ"})
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([learned or text()], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    fast.save_pretrained(directory)


def write_model(
    directory: Path,
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    dtype: str = "float32",
    positions: int = POSITIONS,
) -> Path:
    """A random Llama of two layers with head_dim 16, whose logits differ well from token to token."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
