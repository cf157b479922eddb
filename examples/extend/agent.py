"""Leads episodes as an agent for OpenAI's interface does: it asks, and asks again where the answer is wrong.

[environment]
kind = "harness"
harness = "examples.extend.agent:second_try"
max_observation_tokens = 64

[environment.arguments]
hint = "That is wrong. Answer with the number alone."
"""

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI


async def second_try(base_url: str, api_key: str, prompt: Mapping[str, Any], hint: str) -> float:
    """Reward the first right answer with 1, the second with 0.5."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = list(prompt["messages"])
    for reward in (1.0, 0.5):
        completion = await client.chat.completions.create(model="student", messages=messages)
        answer = completion.choices[0].message.content or ""
        if answer.strip() == prompt["answer"]:
            return reward
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": hint}]
    return 0.0
