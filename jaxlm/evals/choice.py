"""Multiple choice from a file of questions, scored as lm-eval scores ARC."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.sources import Record, read_records
from jaxlm.evals.results import Outcome, Sample, mean_and_error
from jaxlm.evals.scoring import Request, Score, score
from jaxlm.evals.subject import Subject

METRICS = ("acc", "acc_norm")


class Question(NamedTuple):
    """One question: its row in the file, its prompt, the texts to choose from, the index of the right one, and what
    stands between prompt and answer."""

    doc: dict[str, Any]
    prompt: str
    choices: list[str]
    gold: int
    separator: str = " "

    @property
    def answers(self) -> list[str]:
        """The texts that are scored after the prompt."""
        return [f"{self.separator}{choice}" for choice in self.choices]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file: `question`, `choices: {text: [...], label: [...]}`, `answerKey`.

    Labels may be letters or numbers.

    Raises:
      FileNotFoundError: no such file.
      ValueError: `file:line: what; what to do`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .jsonl of questions")
    questions = [_question(record) for record in read_records(str(path), field="--tasks")]
    if not questions:
        raise ValueError(f"{path}: no question in it; one JSON object a line is needed")
    return questions


def evaluate(subject: Subject, questions: Sequence[Question], task: str) -> Outcome:
    """Choose the likeliest answer to each question.

    `acc` is the share of questions whose right answer has the largest log-likelihood after
    `Question: {question}\\nAnswer:`; for `acc_norm` it is divided by the answer's length in characters first.

    Args:
      subject: the model.
      questions: as from `read_questions`.
      task: its name in the results.

    Returns:
      Both metrics with standard errors, and a sample a question.
    """
    pairs = [(question.prompt, answer) for question in questions for answer in question.answers]
    scores = iter(score(subject, [Request(*subject.encode_pair(*pair)) for pair in pairs]))
    samples = [
        _sample(number, question, [next(scores) for _ in question.choices]) for number, question in enumerate(questions)
    ]
    values: dict[str, Any] = {"alias": task}
    for metric in METRICS:
        mean, error = mean_and_error(sample[metric] for sample in samples)
        values |= {f"{metric},none": mean, f"{metric}_stderr,none": error}
    count = {"original": len(questions), "effective": len(questions)}
    return Outcome({task: values}, {task: samples}, {"n-samples": {task: count}})


def _question(record: Record) -> Question:
    where, doc = record
    choices = doc.get("choices")
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(doc.get("question"), str):
        raise ValueError(f'{where}: no text in "question"; write it')
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: no list of texts in "choices.text"; write {{"text": [...], "label": [...]}}')
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise ValueError(f'{where}: "choices.label" needs one label for each of the {len(texts)} texts; write them')
    known = [str(label) for label in labels]
    if str(doc.get("answerKey")) not in known:
        raise ValueError(
            f'{where}: "answerKey" is {doc.get("answerKey")!r}, which is no label; the labels are {", ".join(known)}'
        )
    return Question(doc, f"Question: {doc['question']}\nAnswer:", texts, known.index(str(doc["answerKey"])))


def _sample(number: int, question: Question, scores: list[Score]) -> Sample:
    """A line of lm-eval's samples."""
    sums = np.array([s.log_likelihood for s in scores])
    sizes = np.array([float(len(choice)) for choice in question.choices])
    with np.errstate(divide="ignore", invalid="ignore"):
        picked = {"acc": int(np.argmax(sums)), "acc_norm": int(np.argmax(sums / sizes))}
    answers = [[s.log_likelihood, s.is_greedy] for s in scores]
    return {
        "doc_id": number,
        "doc": question.doc,
        "target": str(question.gold),
        "arguments": {
            f"gen_args_{i}": {"arg_0": question.prompt, "arg_1": answer} for i, answer in enumerate(question.answers)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": list(METRICS),
        **{metric: float(choice == question.gold) for metric, choice in picked.items()},
    }
