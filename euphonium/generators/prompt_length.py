"""Prompts that are longer than their text encoder reads: what is behind its last token never reaches the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from euphonium.generators.components import quiet
from euphonium.generators.generator import Generator
from euphonium.text_files import quoted

log = logging.getLogger(__name__)


def warn_of_cut_prompts(generator: Generator, prompts: Iterable[str]) -> dict[str, str]:
    """Warns, once, of the prompts that are cut.

    Args:
        generator: the generator.
        prompts: texts.

    Returns:
        The warning as a line of a plan, by name; nothing if no prompt is cut, or if the tokenizer is not here.
    """
    if not (generator.folder / generator.prompt_tokenizer).is_dir():
        return {}
    texts = list(dict.fromkeys(map(str, prompts)))
    with quiet():
        tokenizer = generator.load_tokenizer()
        counts = generator.token_counts(tokenizer, texts)
    limit = generator.token_limit(tokenizer)
    if not texts or max(counts) <= limit:
        return {}
    cut, (longest, text) = sum(count > limit for count in counts), max(zip(counts, texts, strict=True))
    found = (
        f"{cut} of {len(texts)} are cut to {limit} tokens; the longest has {longest}: {quoted(text)}; shorten them, or "
        "raise model.max_prompt_tokens as far as the model goes"
    )
    log.warning("prompts: %s", found)
    return {"prompts that are cut": found}
