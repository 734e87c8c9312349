"""Text of the demo model: the Python standard library's sources, split, tokenized and packed into windows.

Library modules are for training. Test modules are held out: some validate (they choose the checkpoint),
others are evaluated once at the end, and which is which depends on a hash of their path alone. Generated code
page tables are left out, being a megabyte of near-identical lines. Functions with a docstring also make short
chats (docstring asked, function answered), so that the chat template is not foreign to the model.

Not here: anything about the network.
"""

import ast
import hashlib
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEST_FOLDERS = {"test", "tests", "idle_test"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "bad_coding", "data"}
EVALUATION_BYTES, VALIDATION_BYTES = 1_000_000, 300_000
# A line break with the next line's indentation is one piece; names take a leading space or dot with them;
# digits go alone. The last two alternatives catch whatever is left, so that nothing is lost.
PIECES = r"\n[\n ]*| ?\.?_*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}_]+|_+|\s+"


@dataclass(frozen=True)
class Corpus:
    """Texts of whole files, and of chats made from the training files."""

    train: list[str]
    chats: list[str]
    validation: list[str]
    evaluation: list[str]


def read_corpus(stdlib: Path) -> Corpus:
    library: list[str] = []
    tests: list[tuple[str, str]] = []
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        text = _read_source(path)
        if TEST_FOLDERS & set(relative.parts):
            tests.append((hashlib.sha256(relative.as_posix().encode()).hexdigest(), text))
        elif "generated from" not in text[:400]:
            library.append(text)
    held_out = [text for _, text in sorted(tests)]
    evaluation = _take(held_out, EVALUATION_BYTES)
    validation = _take(held_out[len(evaluation) :], VALIDATION_BYTES)
    if not library or not validation:
        raise ValueError(
            f"{stdlib} holds no library sources or too few test modules; name another with --stdlib"
        )
    return Corpus([t for t in library if t], _chats(library), validation, evaluation)


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every byte is in the alphabet, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """One int64 array a text, each ended by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array([*e.ids, tokenizer.eos_token_id], dtype=np.int64) for e in encodings]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of text each token id stands for; special tokens stand for none."""
    lengths = np.array(
        [len(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))], dtype=np.int64
    )
    lengths[tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)] = 0
    return lengths


def fixed_windows(documents: list[np.ndarray], length: int) -> np.ndarray:
    """(windows, length + 1), in order, each sharing one token with the next, the ragged end dropped."""
    stream = np.concatenate(documents)
    starts = np.arange(0, len(stream) - length, length)
    return stream[starts[:, None] + np.arange(length + 1)]


def shuffled_batches(
    documents: list[np.ndarray], length: int, batch: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Endless (batch, length + 1). Each epoch has its own document order and offset, so its own windows."""
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        windows = fixed_windows([stream[rng.integers(length) :]], length)
        windows = windows[rng.permutation(len(windows))]
        if len(windows) < batch:
            raise ValueError(f"the training text makes {len(windows)} windows, fewer than a batch of {batch}")
        for start in range(0, len(windows) - batch + 1, batch):
            yield windows[start : start + batch]


def _read_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours coding cookies
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _take(texts: list[str], limit: int) -> list[str]:
    taken, size = [], 0
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


def _chats(sources: list[str]) -> list[str]:
    return [chat for source in sources for chat in _chats_of(source)]


def _chats_of(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno > 30:
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(question := docstring.splitlines()[0]) > 15:
            answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"
