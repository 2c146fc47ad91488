"""A CLIP vocabulary in which every word of the captions is one token."""

from fact_jax.portraits.captions import VOCABULARY

START, END = "<|startoftext|>", "<|endoftext|>"


def caption_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in CLIP's byte-pair format.

    All bytes are there, alone and at the end of a word, so that any prompt can be tokenised; words
    outside the world's vocabulary fall into letters.
    """
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    # Longer words first: a short word's merges must not cut a longer one's.
    for word in sorted((w for w in VOCABULARY if len(w) > 1), key=lambda w: (-len(w), w)):
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if position == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes that byte-level BPE works on (GPT-2's alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
