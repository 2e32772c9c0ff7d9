"""The openai package and a model of this machine: `pip install openai`, and in another terminal

    edgekv serve

That prints an address. It and a key for this program are all that the client needs to know:

    export OPENAI_BASE_URL=http://127.0.0.1:8642/v1 OPENAI_API_KEY=$(edgekv apps add example)
    python openai_client.py
"""

from openai import OpenAI

with OpenAI() as client:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    stream = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=60, stream=True
    )
    answer = ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        answer += piece
        print(piece, end="", flush=True)
    print()

    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And of Italy?"},
    ]
    again = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=60)
    print(again.choices[0].message.content)
    details = again.usage.prompt_tokens_details
    print(
        f"{details.cached_tokens} of {again.usage.prompt_tokens} prompt tokens were there already"
    )
