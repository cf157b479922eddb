from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass
class ChainSumConfig:
    """Has the fields of the package's task that the tests set."""

    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4
    allow_negation: bool = False
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.max_terms >= self.min_terms, "max_terms must be >= min_terms"


class ChainSumDataset:
    """Asks for sums; the entry follows from seed and index."""

    def __init__(self, config: ChainSumConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = Random((self.config.seed or 0) + index)
        terms = [random.randint(1, 9) for _ in range(random.randint(self.config.min_terms, self.config.max_terms))]
        question = f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="
        return {"question": question, "answer": str(sum(terms)), "metadata": {"difficulty": {"num_terms": (2, 6)}}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        oracle = entry["answer"]
        if not isinstance(answer, str) or oracle not in answer:
            return 0.0
        return 1.0 if answer == oracle else len(oracle) / len(answer)


DATASETS: dict[str, tuple[type, type]] = {"chain_sum": (ChainSumDataset, ChainSumConfig)}


def create_dataset(name: str, **parameters: Any) -> ChainSumDataset:
    config = ChainSumConfig(**parameters)
    config.validate()
    return ChainSumDataset(config)
