"""Asks for sums in up to two tries: an environment of the package `verifiers`, with one taskset and one agent.

[prompts]
train = "verifiers:preceptor_sums?num_tasks=200"

[environment]
kind = "verifiers"
python = "verifiers-env/bin/python"
"""

import random
import re

import verifiers.v1 as vf

__all__ = ["SumsEnv", "SumsTaskset"]


class SumData(vf.TaskData):
    """Holds one sum."""

    answer: str


class SumTask(vf.Task[SumData]):
    """Gives 1 for the right number in the last message, 0.5 if it came at the second try."""

    @vf.reward(weight=1.0)
    async def is_right(self, trace: vf.Trace) -> float:
        replies = [node.message.content or "" for node in trace.nodes if node.sampled]
        return (1.0, 0.5)[len(replies) - 1] if answers(replies[-1], self.data) else 0.0


class SumsConfig(vf.TasksetConfig):
    """Sets how many sums there are, and which."""

    num_tasks: int = 100
    seed: int = 0


class SumsTaskset(vf.Taskset[SumTask, SumsConfig]):
    """Makes sums of two numbers up to 9."""

    def load(self) -> list[SumTask]:
        numbers = random.Random(self.config.seed)
        pairs = [(numbers.randint(0, 9), numbers.randint(0, 9)) for _ in range(self.config.num_tasks)]
        return [SumTask(SumData(prompt=f"What is {a} + {b}?", answer=str(a + b))) for a, b in pairs]


class SumsEnvConfig(vf.EnvConfig):
    """Names the agent."""

    agent: vf.AgentConfig = vf.AgentConfig()


class SumsEnv(vf.Env[SumsEnvConfig]):
    """Gives the agent a second try."""

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()
            if not segment.terminated and not answers(segment.last_reply, task.data):
                await interaction.turn("That is wrong. Answer with the number alone.")


def answers(reply: str, data: vf.TaskData) -> bool:
    """Return whether the last number of a reply is the answer."""
    return re.findall(r"-?\d+", reply)[-1:] == [data.answer]
