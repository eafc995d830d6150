"""The feed-forward parts of a trained text model: linear students against gated ones.

A small GPT-2 is trained on the documentation strings of the standard library (``text_corpus.py``).
Then every feed-forward part is replaced, in order, each on the activations that the already
compressed network gives it, without labels and with padding masked out: by linear students, and by
gated ones with the nuclear penalty, for the teacher's gates or Gaussian ones, or with the penalty
"gate", whose solver works on the rows themselves and is cut off by a time limit. Students of
one size store at most as many numbers, gates included: a size is a multiple of the full linear
map's (width + 1) * width, beyond which a linear student cannot grow. ``cvxdistill.compress`` may
make the whole model as large: with linear students of the same parts, of the two layers in each
(their activation stays), and of all that it finds. All are judged by test files.

Run ``python bench/text_transformer.py``; writes ``bench/results/text_transformer.csv`` and
``.png``.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from machine import describe_machine
from text_corpus import START, Batch, Vocabulary, batches, split_docstrings
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

import cvxdistill

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "text_transformer"
CACHE = HERE / ".cache" / "text_transformer"

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 96, 4, 4, 64, 2_000
EPOCHS, BATCH_SIZE, LEARNING_RATE, SHORTENED = 6, 32, 3e-3, 0.1
# Numbers that a student may store, as multiples of a full linear map's.
SIZES = (0.5, 1.0, 2.0)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"student": "linear"},
    "gated, teacher's gates": {"student": "gated", "gates": "teacher", "penalty": "nuclear"},
    "gated, Gaussian gates": {"student": "gated", "gates": "gaussian", "penalty": "nuclear"},
    "gated, gate penalty": {"student": "gated", "gates": "teacher", "penalty": "gate"},
}
# Share of a gated student's numbers that gates may take, and gates at most.
GATE_SHARE, MOST_GATES = 0.25, 32
# One batch of so many is distilled from; rows that are fitted; seconds for each alpha.
EVERY, MAX_ROWS, TIME_LIMIT = 3, 20_000, 3.0
# ``compress`` goes through all its examples for every student: it gets one batch of so many.
EVERY_COMPRESSED = 12


@dataclass(frozen=True)
class Text:
    """Padded batches of training and test text, and what they are made of."""

    vocabulary: Vocabulary
    train: list[Batch]
    test: list[Batch]


def load_text(
    vocabulary: int = VOCABULARY, length: int = LENGTH, most_files: int | None = None
) -> Text:
    """The standard library's docstrings; the vocabulary is that of the training files."""
    train, test = split_docstrings(most_files=most_files)
    known = Vocabulary.of(train, vocabulary)
    parts = (batches(known.sequences(part, length), BATCH_SIZE) for part in (train, test))
    return Text(known, *parts)


def untrained(vocabulary: int, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    """A GPT-2 with random weights and a feed-forward part four times as wide as the model."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=HEADS,
        vocab_size=vocabulary,
        n_positions=LENGTH,
        bos_token_id=START,
        eos_token_id=START,
        use_cache=False,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    return model


def next_words(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits (m, words) and the word that follows each, without padding."""
    keep = batch["attention_mask"][:, 1:].bool()
    return logits[:, :-1][keep], batch["input_ids"][:, 1:][keep]


def train(model: nn.Module, text: list[Batch], epochs: int) -> nn.Module:
    """AdamW with one cycle of the learning rate, on batches in random order."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * len(text)
    )
    model.train()
    for _ in range(epochs):
        for number in torch.randperm(len(text), generator=generator):
            batch = text[number]
            loss = cross_entropy(*next_words(model(**batch).logits, batch))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def run(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The last hidden states (m, d) of all tokens, and the logits (N, T, words)."""
    with torch.inference_mode():
        output = model(**batch, output_hidden_states=True)
    return output.hidden_states[-1][batch["attention_mask"].bool()], output.logits


def trained(text: Text, epochs: int) -> tuple[nn.Module, float]:
    """The trained model and the seconds that it took; kept in the cache for the next run."""
    model = untrained(len(text.vocabulary.words))
    words = hashlib.sha256(" ".join(text.vocabulary.words).encode()).hexdigest()[:12]
    file = CACHE / f"teacher-{words}-{len(text.train)}-{epochs}.pt"
    if file.exists():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["weights"])
        return model, kept["seconds"]
    start = time.perf_counter()
    train(model, text.train, epochs)
    seconds = time.perf_counter() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": model.state_dict(), "seconds": seconds}, file)
    return model, seconds


@dataclass(frozen=True)
class Teacher:
    """The trained model, and its answers for the test text."""

    model: nn.Module
    test: list[Batch]
    hidden: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, test: list[Batch]) -> Teacher:
        """Run the model over the test text."""
        return cls(model, test, [run(model, batch)[0] for batch in test])

    def compare(self, model: nn.Module) -> dict[str, float]:
        """Size, likeness of the last hidden states, and how well the next word is told.

        ``cosine`` is the mean over tokens, ``error`` is ||H' - H||_F / ||H||_F, both uncentred.
        """
        cosine = wrong = size = loss = 0.0
        right = tokens = targets = 0
        for batch, expected in zip(self.test, self.hidden, strict=True):
            hidden, logits = run(model, batch)
            cosine += float(cosine_similarity(hidden, expected).double().sum())
            wrong += float((hidden - expected).double().square().sum())
            size += float(expected.double().square().sum())
            tokens += len(expected)
            scores, answers = next_words(logits, batch)
            loss += float(cross_entropy(scores, answers, reduction="sum"))
            right += int((scores.argmax(dim=1) == answers).sum())
            targets += len(answers)
        return {
            "parameters": stored(model),
            "cosine": cosine / tokens,
            "error": math.sqrt(wrong / size),
            "perplexity": math.exp(loss / targets),
            "accuracy": right / targets,
        }


def stored(model: nn.Module) -> int:
    """Numbers in a model: parameters, and all that students store beside them."""
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    for module in model.modules():
        if hasattr(module, "parameters_stored"):
            tensors |= {id(tensor): tensor for tensor in module.buffers()}
    return sum(tensor.numel() for tensor in tensors.values())


def unigram(text: Text) -> dict[str, float]:
    """Perplexity and accuracy of the training text's word frequencies (one added to each)."""
    counts: Counter[int] = Counter()
    for batch in text.train:
        counts.update(batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:].bool()].tolist())
    scores = torch.tensor([counts[k] + 1.0 for k in range(len(text.vocabulary.words))])
    log = torch.log(scores / scores.sum())
    answers = torch.cat(
        [b["input_ids"][:, 1:][b["attention_mask"][:, 1:].bool()] for b in text.test]
    )
    return {
        "perplexity": float(torch.exp(-log[answers].double().mean())),
        "accuracy": float((answers == scores.argmax()).double().mean()),
    }


def parts(model: nn.Module) -> list[str]:
    """Names of the feed-forward parts."""
    return [f"transformer.h.{layer}.mlp" for layer in range(model.config.n_layer)]


def without_parts(model: nn.Module) -> nn.Module:
    """The model with all feed-forward parts left out: what they matter."""
    model = copy.deepcopy(model)
    for layer in model.transformer.h:
        layer.mlp = Nothing()
    return model


class Nothing(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(input)


def student_size(method: str, size: float, width: int) -> dict[str, int] | None:
    """Units and gates that store at most size * (width + 1) * width; None where nothing fits.

    A unit stores its weights, an offset and the index of its gate: 2 width + 2; a gate width + 1.
    """
    budget = round(size * (width + 1) * width)
    if method == "linear":
        if size > 1:
            return None
        return {"n_neurons": width if size == 1 else (budget - width) // (2 * width)}
    n_gates = min(MOST_GATES, int(GATE_SHARE * budget) // (width + 1))
    n_neurons = (budget - width - n_gates * (width + 1)) // (2 * width + 2)
    return {"n_neurons": n_neurons, "n_gates": n_gates} if n_gates else None


def distilled(model: nn.Module, text: list[Batch], **options: Any) -> nn.Module:
    """The model with a student for each feed-forward part, one after the other."""
    for name in parts(model):
        model = cvxdistill.distill(
            model,
            name,
            text,
            max_rows=MAX_ROWS,
            time_limit=TIME_LIMIT,
            tol=2e-2,
            verbose=0,
            **options,
        ).model
    return model


def compare(
    teacher: Teacher, text: list[Batch], methods: Sequence[str], sizes: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """One row for each method and size, then ``compress`` with budgets of the same sizes."""
    width = teacher.model.config.n_embd
    for method in methods:
        for size in sizes:
            chosen = student_size(method, size, width)
            if chosen is None:
                continue
            start = time.perf_counter()
            model = distilled(teacher.model, text, **METHODS[method], **chosen)
            seconds = time.perf_counter() - start
            row = {"method": method, "size": size, **chosen, **teacher.compare(model)}
            yield {**row, "seconds": seconds}
    few = text[:: max(1, EVERY_COMPRESSED // EVERY)]
    fixed = stored(without_parts(teacher.model))
    for size in sizes:
        budget = fixed + round(size * (width + 1) * width) * teacher.model.config.n_layer
        yield from compressed(teacher, few, size, budget)


def compressed(
    teacher: Teacher, text: list[Batch], size: float, budget: int
) -> Iterator[dict[str, Any]]:
    """Rows of ``compress``: of the feed-forward parts, of the layers in them, of all it finds."""
    names = parts(teacher.model)
    layers = [f"{name}.{layer}" for name in names for layer in ("c_fc", "c_proj")]
    choices = {"parts": names, "layers of parts": layers, "all": "auto"}
    for choice, blocks in choices.items():
        start = time.perf_counter()
        found = cvxdistill.compress(
            teacher.model, text, max_parameters=budget, blocks=blocks, verbose=0
        )
        seconds = time.perf_counter() - start
        row = {"method": f"compress, {choice}", "size": size, **teacher.compare(found.model)}
        yield {**row, "seconds": seconds}


def draw(table: pd.DataFrame, file: Path) -> None:
    """Cosine and perplexity by numbers stored in the whole model."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, ("cosine", "perplexity"), strict=True):
        for method, rows in table[table["size"].notna()].groupby("method", sort=False):
            thousands = rows["parameters"] / 1000
            axis.plot(thousands, rows[name], "o-", label=method, markersize=4)
        value = table.set_index("method").loc["teacher", name]
        axis.axhline(value, color="black", linewidth=0.8, linestyle=":", label="teacher")
        axis.set(xlabel="numbers stored in the whole model, thousands", ylabel=name)
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--epochs", default=EPOCHS, show_default=True, type=click.IntRange(1))
@click.option("--files", type=click.IntRange(10), help="The first files only; by default all.")
@click.option(
    "--methods", default=";".join(METHODS), show_default=True, help="Separated by semicolons."
)
@click.option("--sizes", default=",".join(f"{s:g}" for s in SIZES), show_default=True)
def main(epochs: int, files: int | None, methods: str, sizes: str) -> None:
    """Train, replace and compare; a smaller run leaves its files in bench/.cache."""
    chosen, multiples = methods.split(";"), [float(size) for size in sizes.split(",")]
    if unknown := set(chosen) - set(METHODS):
        raise click.BadParameter(f"unknown: {', '.join(unknown)}.", None, "--methods")
    machine = f"{describe_machine('torch', 'transformers', 'cvxdistill')}, "
    machine += f"{torch.get_num_threads()} threads"
    print(machine, flush=True)
    text = load_text(most_files=files)
    tokens = [sum(int(b["attention_mask"].sum()) for b in part) for part in (text.train, text.test)]
    print(f"{tokens[0]:,} tokens of training text, {tokens[1]:,} of test text", flush=True)
    model, seconds = trained(text, epochs)
    teacher = Teacher.of(model, text.test)
    begun = teacher.compare(untrained(len(text.vocabulary.words)))
    rows: list[dict[str, Any]] = [{"method": "untrained", **begun}]
    rows.append({"method": "unigram", **unigram(text)})
    rows.append({"method": "teacher", **teacher.compare(model), "seconds": seconds})
    rows.append({"method": "no feed-forward parts", **teacher.compare(without_parts(model))})
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format), flush=True)
    whole = files is None and epochs == EPOCHS and chosen == list(METHODS)
    output = RESULTS if whole and tuple(multiples) == SIZES else CACHE / "subset"
    output.parent.mkdir(parents=True, exist_ok=True)
    for row in compare(teacher, text.train[::EVERY], chosen, multiples):
        rows.append(row)
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items())
        print("  ".join(shown), flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    print(machine)
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(table, output.with_suffix(".png"))
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
