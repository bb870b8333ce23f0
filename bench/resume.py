"""Whether generations that are resumed are what they would have been in one piece: `python bench/resume.py`.

On real vLLM, with a model made for this unless another is given: random prompts; bytes of Chinese, emoji and letters
made likely, so that cuts fall inside of characters; stop strings and bad words taken from the output itself; bounds,
penalties and log-probabilities; every third one drawn with a seed. Each is resumed at every cut that a client can
have seen.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from services.inference.demo_model import make_demo_model
from services.inference.request import Generation, Sampling
from services.inference.vllm_engine import VllmEngine
from tests.support.engine_process import generate, worker_settings
from tests.support.resume import Resumed, resume_everywhere

_WIDE = "日本語的大家好🚀🌱🙂é"


async def measure(model: Path, generations: int, tokens: int, seed: int) -> bool:
    """Prints what came of it; true when all was the same."""
    draw = random.Random(seed)
    settings = worker_settings(str(model), engine_args={"max_num_seqs": 64}, max_queued=4096)
    async with VllmEngine(settings) as engine:
        begun, results = time.monotonic(), list[Resumed]()
        wide = sorted({token for char in _WIDE for token in await engine.tokenize(char, special_tokens=False)})
        for number in range(generations):
            asked = _asked(draw, number, tokens, wide, engine.card.vocabulary_size)
            if number % 3 == 0:
                asked = await _with_stop(engine, draw, asked)
            if number % 3 == 1 or number % 5 == 0:
                asked = await _with_bad_words(engine, draw, asked)
            results.append(await resume_everywhere(engine, asked))
        took = time.monotonic() - begun
    differences = [line for result in results for line in result.differences]
    print("\n".join(differences[:20]))
    ends = {
        reason: sum(result.whole.reason is reason for result in results) for reason in {r.whole.reason for r in results}
    }
    print(
        f"{generations} generations, {sum(len(result.whole.token_ids) for result in results)} tokens, "
        f"{sum(result.cuts for result in results)} resumptions in {took:.0f} s: {len(differences)} differ; "
        f"log-probabilities at most {max(result.farthest_logprob for result in results):.1e} apart; "
        f"ends: {', '.join(f'{reason.value} {count}' for reason, count in ends.items() if reason)}"
    )
    return not differences


def _asked(draw: random.Random, number: int, tokens: int, wide: list[int], vocabulary: int) -> Generation:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": draw.random() < 0.7}
    if number % 2:
        # As likely as what the model would have said anyway, so that both are mixed.
        values["logit_bias"] = {token: draw.uniform(60, 90) for token in wide}
    if draw.random() < 0.4:
        values["logprob_count"] = draw.randint(0, 5)
    if draw.random() < 0.4:
        values["repetition_penalty"] = draw.uniform(1.05, 1.6)
    for name in ("presence_penalty", "frequency_penalty"):
        if draw.random() < 0.4:
            values[name] = draw.uniform(-2, 2)
    if draw.random() < 0.3:
        values["min_tokens"] = draw.randint(1, tokens)
    values["keep_special_tokens"] = draw.random() < 0.3
    if number % 3 == 0:
        values |= {"temperature": draw.uniform(0.5, 1.5), "top_p": draw.uniform(0.7, 1), "seed": draw.getrandbits(31)}
    prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randint(1, 60))]
    return Generation(id=f"g{number}", model="demo", prompt=prompt, kind="tokens", sampling=Sampling(**values))


async def _with_stop(engine: VllmEngine, draw: random.Random, asked: Generation) -> Generation:
    text = (await generate(engine, asked)).text
    at = draw.randrange(max(1, len(text) - 8))
    stops = [text[at : at + draw.randint(1, 8)] or "x", "never in it, but as long as this: much is held back"]
    sampling = replace(asked.sampling, stop=stops, include_stop_string=draw.random() < 0.4)
    return replace(asked, sampling=sampling)


async def _with_bad_words(engine: VllmEngine, draw: random.Random, asked: Generation) -> Generation:
    whole = await generate(engine, asked)
    texts = [
        (await engine.detokenize(whole.token_ids[at : at + draw.randint(1, 3)])).strip()
        for at in (draw.randrange(len(whole.token_ids)) for _ in range(4))
    ]
    words = [text for text in texts if text and "\ufffd" not in text] or ["x"]
    return replace(asked, sampling=replace(asked.sampling, bad_words=words))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; default: a small one, made for this")
    parser.add_argument("--generations", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = given.model or make_demo_model(Path(scratch) / "demo")
        same = uvloop.run(measure(model, given.generations, given.tokens, given.seed))
    sys.exit(not same)


if __name__ == "__main__":
    main()
