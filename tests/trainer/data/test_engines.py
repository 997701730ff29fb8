"""Ids are those of transformers whatever tokenizes, and no special token is parsed out of text."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import sentences, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.schema import ConfigError
from trainer.data import engines
from trainer.data.blocks import Ragged
from trainer.data.engines import COMPARED_CHARACTERS, COMPARED_DOCUMENTS, adversarial, difference, sample
from trainer.data.tokenizer import DocumentTokenizer, choose_engine

END = "</s>"
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    *sentences(150),
    "def f(x):\n    return x ** 2  # naïve café\n" * 3,
    "日本語と English を混ぜた 文章 42",
]


def gpt_2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama_3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama_2() -> Tokenizer:
    """As sentencepiece's BPE is converted: no pre-tokenizer, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzD.,"]
    merges = [("▁", "t"), ("h", "i"), ("n", "g"), ("▁t", "hi"), ("▁thi", "ng"), ("a", "n"), ("an", "d")]
    pieces += [*words, *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(tokenizer, trainers.BpeTrainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(tokenizer, trainers.WordLevelTrainer)


def whole_words() -> Tokenizer:
    """BPE that takes a word as it stands if the vocabulary has it, a special token's text as well."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(tokenizer, trainers.BpeTrainer)


def trained(tokenizer: Tokenizer, trainer: type[trainers.Trainer], **options: object) -> Tokenizer:
    settings = {"vocab_size": 400, "special_tokens": ["<unk>", END], "show_progress": False} | options
    tokenizer.train_from_iterator([*TEXTS, "".join(map(chr, range(32, 127)))], trainer(**settings))
    return tokenizer


FAST = (gpt_2, llama_3)
SLOW = (llama_2, metaspace, unigram, word_level, whole_words)


def loaded(tokenizer: Tokenizer) -> DocumentTokenizer:
    pretrained = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")
    return DocumentTokenizer(pretrained, "model.tokenizer=x")


def documents(ragged: Ragged) -> list[list[int]]:
    return [ragged.ids[start:end].tolist() for start, end in pairwise(ragged.starts.tolist())]


@pytest.fixture(params=[*FAST, *SLOW], ids=lambda build: build.__name__)
def any_tokenizer(request: pytest.FixtureRequest) -> DocumentTokenizer:
    return loaded(request.param())


def test_ids_are_those_of_the_tokenizer_itself(any_tokenizer: DocumentTokenizer) -> None:
    plain = Tokenizer.from_str(any_tokenizer.pretrained.backend_tokenizer.to_str())
    texts = [text for text in [*TEXTS, "", "x" * 3000, "\0 é 👍"] if END not in text]
    expected = [plain.encode(text, add_special_tokens=False).ids for text in texts]
    ended = [[*ids, any_tokenizer.end_of_document] if ids else [] for ids in expected]
    assert documents(any_tokenizer.encode(texts)) == ended


def test_long_documents_are_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded(gpt_2())
    at_once, lengths = tokenizer.encode(TEXTS), list[int]()
    monkeypatch.setattr(engines, "CHARACTERS_PER_ENCODE", 200)
    encoded = engines.Truth._encoded

    def noted(self: engines.Truth, texts: list[str]) -> list[NDArray[np.int32]]:
        lengths.append(sum(map(len, texts)))
        return encoded(self, texts)

    monkeypatch.setattr(engines.Truth, "_encoded", noted)
    assert documents(tokenizer.encode(TEXTS)) == documents(at_once)
    assert max(lengths) <= 200
    assert sum(lengths) == sum(map(len, TEXTS))


@pytest.mark.parametrize("text", [END, f"a {END} b", f"a{END}b", f" {END}\n", f"{END}{END}", "<unk> x"])
def test_no_special_token_is_parsed_out_of_a_document(any_tokenizer: DocumentTokenizer, text: str) -> None:
    choose_engine(any_tokenizer, "auto", TEXTS)
    ids = any_tokenizer.encode([text]).ids
    assert np.count_nonzero(ids == any_tokenizer.end_of_document) == 1
    assert ids[-1] == any_tokenizer.end_of_document


def test_another_process_gets_the_same_ids(any_tokenizer: DocumentTokenizer) -> None:
    choose_engine(any_tokenizer, "auto", TEXTS)
    texts = [*TEXTS, f"a {END} b"]
    sent = pickle.loads(pickle.dumps(any_tokenizer.encoder))  # noqa: S301
    assert type(sent.encode) is type(any_tokenizer.encoder.encode)
    assert documents(sent.encode(texts)) == documents(any_tokenizer.encode(texts))


def test_a_process_that_only_encodes_needs_no_torch() -> None:
    program = (
        "import sys, trainer.data.tokenized_writer, trainer.tokenizing\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("build", FAST)
def test_fastokens_is_taken_where_it_gives_the_same_ids(build: object) -> None:
    pytest.importorskip("fastokens")
    truth, fast = loaded(build()), loaded(build())  # type: ignore[operator]
    assert choose_engine(fast, "auto", TEXTS) == (fast, None)
    assert (truth.engine, fast.engine) == ("transformers", "fastokens")
    texts = [*TEXTS, *adversarial([END]), ""]
    assert documents(fast.encode(texts)) == documents(truth.encode(texts))
    assert fast.encode(texts).ids.dtype == np.int32
    assert documents(fast.encode(["", "", "a"])) == documents(truth.encode(["", "", "a"]))
    assert documents(fast.encode([])) == []


def test_fastokens_is_not_taken_where_it_parses_a_spelled_piece_as_one() -> None:
    """fastokens 0.3.5 does so with tokenizers made by sentencepiece, for <0x0A> and </s>."""
    pytest.importorskip("fastokens")
    tokenizer, reason = choose_engine(loaded(llama_2()), "auto", TEXTS)
    assert tokenizer.engine == "transformers"
    assert reason is not None
    assert reason.startswith("other ids than transformers for '<0x0A>")


@pytest.mark.parametrize("build", [metaspace, unigram, word_level])
def test_what_fastokens_does_not_support_stays_with_transformers(build: object) -> None:
    pytest.importorskip("fastokens")
    tokenizer, reason = choose_engine(loaded(build()), "auto", TEXTS)  # type: ignore[operator]
    assert tokenizer.engine == "transformers"
    assert reason is not None
    assert "cannot load this tokenizer" in reason


def test_fastokens_that_is_asked_for_but_not_supported_is_a_mistake() -> None:
    pytest.importorskip("fastokens")
    with pytest.raises(ConfigError, match=r"^data\.engine=fastokens: it cannot load this tokenizer: "):
        choose_engine(loaded(unigram()), "fastokens", TEXTS)


def test_without_fastokens_only_asking_for_it_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tokenizer: DocumentTokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)  # as if it were not installed
    assert choose_engine(tokenizer, "auto", TEXTS) == (tokenizer, None)
    assert tokenizer.engine == "transformers"
    with pytest.raises(ConfigError, match=r"^data\.engine=fastokens: it is not installed; allowed: auto, "):
        choose_engine(tokenizer, "fastokens", TEXTS)


class Altered:
    """fastokens, but for one text that it gets wrong."""

    def __init__(self, backend: Tokenizer, end_of_document: int) -> None:
        self._encode = engines.Truth(backend, end_of_document)

    def __call__(self, texts: Sequence[str]) -> Ragged:
        return self._encode([text.replace("thing 13 ", "thing 31 ") for text in texts])


def test_a_single_differing_id_keeps_the_truth_and_names_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    monkeypatch.setattr("trainer.data.tokenizer.Fast", Altered)
    tokenizer = DocumentTokenizer(pretrained, "x")
    _, reason = choose_engine(tokenizer, "auto", [*TEXTS, "thing 13 and more" * 10])
    assert tokenizer.engine == "transformers"
    assert reason is not None
    assert reason.startswith("other ids than transformers for 'Document ")
    assert len(reason) < 150
    with pytest.raises(ConfigError, match=r"^data\.engine=fastokens: other ids than transformers for "):
        choose_engine(tokenizer, "fastokens", ["thing 13 "])


def test_a_document_cut_elsewhere_is_a_difference() -> None:
    def one(texts: Sequence[str]) -> Ragged:
        return Ragged(np.array([1, 2, 3], np.int32), np.array([0, 1, 3]))

    def other(texts: Sequence[str]) -> Ragged:
        return Ragged(np.array([1, 2, 3], np.int32), np.array([0, 2, 3]))

    assert difference(one, one, ["a", "b"]) is None
    assert difference(one, other, ["a", "b"]) == "'a'"


def test_about_a_thousand_documents_are_compared_at_different_places() -> None:
    def endless(text: str) -> Iterator[str]:
        while True:
            yield text

    assert list(sample(endless("short"))) == ["short"] * COMPARED_DOCUMENTS
    text = "".join(map(str, range(10_000)))
    pieces = list(sample(endless(text)))
    assert {len(piece) for piece in pieces} == {COMPARED_CHARACTERS}
    assert len(pieces) == COMPARED_DOCUMENTS
    places = [text.index(piece) for piece in pieces]
    assert (places[0], max(places) > 0.9 * len(text)) == (0, True)


def test_adversarial_texts_are_text() -> None:
    texts = list(adversarial([END]))
    assert all(text.encode() is not None for text in texts)  # half a surrogate pair would raise
    assert "" in texts
    assert END in texts
    assert any("\0" in text for text in texts)
    assert {len({*text}) for text in texts if len(text) > 4000} == {1, 2}


def test_a_text_that_fastokens_refuses_goes_to_the_truth() -> None:
    """Its regular expressions give up where those of tokenizers search on."""
    pytest.importorskip("fastokens")
    backend = gpt_2()
    slow = r"(a+)+b|."
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(slow), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    truth, fast = engines.Truth(backend, 0), engines.Fast(backend, 0)
    text = "a" * 23 + "c"
    with pytest.raises(ValueError, match="limit"):
        fast._encode([text])
    assert documents(fast(["x", text])) == documents(truth(["x", text]))
