"""Log-probabilities of the simulated engine: made up, of prompt and position alone."""

from collections.abc import Sequence

from services.inference import sim_text
from services.inference.output import TokenLogprob, TokenLogprobs

__all__ = ["prompt_logprobs", "token_logprobs"]


def token_logprobs(seed: int, position: int, token_id: int, count: int) -> TokenLogprobs:
    """Those of a token, which is the likeliest one, and of the `count` likeliest in all."""
    chosen = _logprob(token_id, 1)
    stride = 1 + (seed + position) % 997
    others = (_logprob((token_id + rank * stride) % sim_text.VOCABULARY_SIZE, rank + 1) for rank in range(1, count))
    return TokenLogprobs(chosen=chosen, alternatives=(chosen, *others) if count else ())


def prompt_logprobs(seed: int, prompt: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Those of a prompt's tokens, but for its first."""
    return [token_logprobs(seed, position, prompt[position], count) for position in range(1, len(prompt))]


def _logprob(token_id: int, rank: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, token=sim_text.token_text(token_id), logprob=0.875 - rank, rank=rank)
