"""A chat on the terminal with a model behind `ft serve`, or any other server that speaks OpenAI's API.

    ft serve outputs/mine
    python examples/chat_client.py --model mine

Needs OpenAI's client: pip install openai. An API key is taken from OPENAI_API_KEY, where the server wants one.
"""

import argparse
import os
import sys

from openai import OpenAI, OpenAIError


def main() -> None:
    """Read lines, show answers as they come; an empty line or the end of the input leaves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the last one that the server lists")
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        model = arguments.model or [found.id for found in client.models.list()][-1]
        print(f"Talking to {model}.", file=sys.stderr)
        talk(client, model, arguments.max_tokens)
    except OpenAIError as error:
        sys.exit(f"The server at {arguments.base_url} says: {error}")


def talk(client: OpenAI, model: str, max_tokens: int) -> None:
    """The conversation; what was said stays in front of the next question."""
    messages = []
    for line in sys.stdin:
        if not line.strip():
            return
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, stream=True)
        for chunk in stream:
            piece = chunk.choices[0].delta.content or ""
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
