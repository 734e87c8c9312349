"""Tokenizer: the stream's pieces are the whole, characters are never cut, chats and bad directories."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.errors import CheckpointError, InvalidRequest
from gpu_worker import tokenizer as tokenizer_module
from gpu_worker.tokenizer import Tokenizer, _load_by_transformers, _load_unchanged

CORPUS = [
    "def main():\n    print('grüße, 你好 🙂')\n",
    "the pair that serves, the store and the worker",
    "don't . ",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda text: "<s>" not in text and "</s>" not in text  # which are tokens without a text
)


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def byte_fallback() -> Backend:
    """As SentencePiece models are: spaces as U+2581, the first one stripped, unknown characters as bytes."""
    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - {"🙂", "你"})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def save(backend: Backend, directory: Path, **config: object) -> Path:
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described | config))
    return directory


def test_transformers_has_nothing_to_say_of_long_chats(tmp_path: Path) -> None:
    """It warned of indexing errors, in a line that was no JSON, before the request was refused."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    directory = save(byte_level(), tmp_path / "m", chat_template=CHAT_TEMPLATE, model_max_length=4)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert len(tokenizer.encode_chat([{"role": "user", "content": "serves" * 9}])) > 4
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("bpe") / "model", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    loaded = Tokenizer.from_directory(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = Tokenizer.from_directory(save(byte_fallback(), tmp_path_factory.mktemp("spm") / "model"))
    assert loaded is not None
    return loaded


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [stream.push(token) for token in ids] + [stream.flush()]


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 340), max_size=40))
def test_pieces_of_any_ids_are_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Ids at random: broken UTF-8, special tokens, and (from 330) ids that the tokenizer does not know."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_pieces_of_a_text_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    got = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(got) == text
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_pieces_with_byte_fallback_and_stripped_spaces(sentencepiece_like: Tokenizer, text: str) -> None:
    ids = sentencepiece_like.encode(text)
    got = pieces(sentencepiece_like, ids)
    assert "".join(got) == sentencepiece_like.decode(ids)
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é漢")[1:]
    got = pieces(tokenizer, ids)
    assert [piece for piece in got if piece] == ["é", "漢"] and got[-2] == "漢"


def test_an_unfinished_character_comes_with_the_flush(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a漢")[1:-1]
    assert pieces(tokenizer, ids)[-2:] == ["", "\ufffd"]


def test_a_character_is_not_taken_for_the_lack_of_one(
    tokenizer: Tokenizer, sentencepiece_like: Tokenizer
) -> None:
    """U+FFFD is a character of its own, and one for each wrong byte."""
    for each in (tokenizer, sentencepiece_like):
        stream = each.stream()
        got = [stream.push(token) for token in each.encode("\ufffd" * 100)]
        assert got[-1] == "\ufffd" and "".join(got) == "\ufffd" * 100 and len(stream._ids) <= 6
    wrong = next(token for token in range(330) if tokenizer.piece(token) == b"\xff")
    assert pieces(tokenizer, [wrong] * 100) == ["\ufffd"] * 100 + [""]


def test_a_stream_begins_anew_after_its_flush(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    first = next(token for token in range(330) if tokenizer.piece(token) == b"\xe6")
    assert (stream.push(first), stream.flush()) == ("", "\ufffd")
    assert "".join(map(stream.push, tokenizer.encode("a漢"))) == "a漢"
    assert stream._bytes.getstate()[0] == b""


@pytest.mark.parametrize("token", [1, 335], ids=["special", "unknown"])
def test_a_long_run_of_tokens_without_text_costs_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """Were they kept until text follows, every step would decode the whole run again."""
    stream = tokenizer.stream()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: pytest.fail("decoded tokens without text"))
    assert {stream.push(token) for _ in range(100)} == {""}


def test_space_cleaning_configured_in_the_checkpoint_is_off(tmp_path: Path) -> None:
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    config = {"clean_up_tokenization_spaces": True} | forced
    loaded = Tokenizer.from_directory(save(byte_level(), tmp_path / "m", **config))
    assert loaded is not None
    assert loaded.decode(loaded.encode("don 't . do")) == "don 't . do"


@given(text=TEXT)
def test_encode_is_what_the_tokenizer_makes_of_one_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids


def test_others_go_on_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    text = CORPUS[0] * 40_000
    thread = threading.Thread(target=tokenizer.encode, args=[text])
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10  # two or three, if they had to wait for it


def test_encode_adds_the_tokenizers_special_tokens_and_decode_drops_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the store")
    assert ids[0] == 0 and tokenizer.special_ids == {0, 1}
    assert tokenizer.decode([*ids, 1]) == "the store"


@pytest.mark.parametrize("chat", [False, True])
def test_far_too_long_a_text_is_refused_before_all_of_it_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """Ten million tokens took a minute and five gigabytes, to be told that they were too many."""
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    backend, read = tokenizer._backend, []

    def encode_batch(texts: list[str]) -> Any:
        read.append(len(texts[0]))
        return backend.encode_batch(texts)

    monkeypatch.setattr(tokenizer_module, "_SLICE", 100)
    monkeypatch.setattr(tokenizer, "_backend", SimpleNamespace(encode_batch=encode_batch))

    def encode(text: str, most: int) -> list[int]:
        if chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}], most=most)
        return tokenizer.encode(text, most)

    with pytest.raises(InvalidRequest, match=r"more than \d+ tokens, of which at most 50 are taken"):
        encode("+" * 1_000_000, 50)
    assert sum(read) < 1000
    long = "the store " * 300  # of as many letters, and no more tokens
    assert encode(long, 700) == encode(long, 1 << 20)


def test_a_chat_is_what_transformers_makes_of_it(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "<s> grüße"}, {"role": "assistant", "content": "the pair"}]
    theirs = tokenizer._by_transformers.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.encode_chat(messages) == list(theirs["input_ids"])


def test_chat_follows_the_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids.count(0) == 2 and ids.count(1) == 1
    assert tokenizer.decode(ids) == "user\nhelloassistant\n"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "tool", "content": "x"}], "rejects these messages: unknown role tool"),
        (
            [{"role": "user", "content": "\ud800"}],
            "rejects these messages",
        ),  # from JSON: no text for a tokenizer
        ([{"role": "user", "content": "\ud800" * 100}], "rejects these messages"),
    ],
)
def test_chats_that_are_rejected(tokenizer: Tokenizer, messages: list[dict[str, str]], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        tokenizer.encode_chat(messages, most=10)


def test_chat_without_a_template(sentencepiece_like: Tokenizer, tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template and not sentencepiece_like.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        sentencepiece_like.encode_chat([{"role": "user", "content": "hello"}])


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
    assert Tokenizer.from_directory(tmp_path) is None


@pytest.mark.parametrize("broken", ["", "{}", '{"model": 1}', "\0\0"])
def test_a_damaged_tokenizer_is_named(directory: Path, tmp_path: Path, broken: str) -> None:
    (tmp_path / "tokenizer.json").write_text(broken)
    (tmp_path / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"tokenizer in {tmp_path} cannot be loaded"):
        Tokenizer.from_directory(tmp_path)


@settings(deadline=None, max_examples=200)
@given(text=TEXT, ids=st.lists(st.integers(0, 329), max_size=20))
def test_without_transformers_it_is_the_same(directory: Path, text: str, ids: list[int]) -> None:
    backend = _load_unchanged(directory)
    assert backend is not None
    reference = _load_by_transformers(directory)
    assert backend.encode(text).ids == reference.encode(text)
    assert backend.decode(ids, skip_special_tokens=True) == reference.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"pad_token": "<pad>"},
        {"extra_special_tokens": ["<think>"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_transformers_would_change_is_left_to_it(tmp_path: Path, config: dict[str, object]) -> None:
    directory = save(byte_level(), tmp_path / "model", **config)
    assert _load_unchanged(directory) is None


def test_a_special_token_that_only_the_config_names_is_special(tmp_path: Path) -> None:
    loaded = Tokenizer.from_directory(save(byte_level(), tmp_path / "model", pad_token="<pad>"))
    assert loaded is not None
    assert len(loaded.special_ids) == 3
