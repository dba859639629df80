"""Streams an answer from a running router: python examples/generate.py HOST:PORT PROMPT."""

from __future__ import annotations

import asyncio
import sys

from common.errors import ExpertMeshError
from expertmesh.client import Chunk, Client, Finished, Sampling, Started


async def stream(target: str, prompt: str) -> None:
    """Print the answer as it arrives, and what it took at the end."""
    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=128)
    async with Client(target) as client:
        model = await client.model()
        print(f"{model.model_name}, up to {model.max_seq_len} tokens", file=sys.stderr)
        async for event in client.generate(prompt, sampling, timeout_s=120):
            match event:
                case Started(prompt_tokens=count):
                    print(f"{count} prompt tokens", file=sys.stderr)
                case Chunk(text=text):
                    print(text, end="", flush=True)
                case Finished(finish_reason=reason, completion_tokens=count, total_s=seconds):
                    print(f"\n{count} tokens in {seconds:.2f} s, {reason}", file=sys.stderr)


def main() -> None:
    """Read the command line."""
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {sys.argv[0]} HOST:PORT PROMPT")
    try:
        asyncio.run(stream(sys.argv[1], sys.argv[2]))
    except ExpertMeshError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
