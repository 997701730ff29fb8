"""The demo's corpora and tokenizer, made from text that is already on the machine.

`general` is the Python documentation and the docstrings of the standard library, `legal` the licence texts
of the installed packages and of the system: small, real, and different enough to show forgetting.
"""

import ast
import gzip
import hashlib
import json
import re
import shutil
import sysconfig
from bisect import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SUMMARY = "corpora.json"
END_OF_TEXT = "<|endoftext|>"
TRAIN_SHARDS = {"general": 4, "legal": 2}
VALIDATION_SHARE = 0.065  # of a corpus's characters
SHORTEST_CHARACTERS, LONGEST_CHARACTERS = 200, 4000  # drop below, split between paragraphs above
HEADING_WORDS = 8  # a paragraph with fewer belongs to the next one
SHINGLE_WORDS = 13  # GPT-3's measure of contamination (arXiv:2005.14165, appendix C)
SEEN_SHARE = 0.2  # of its shingles: from here on a paragraph counts as a copy
# Installation times are all the time these texts have; a constant keeps equal texts equal bytes.
TIMESTAMP = "2000-01-01T00:00:00Z"

# Prose has them, lists of files and names do not: Gopher's filter (arXiv:2112.11446, appendix A).
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
STOP_WORD_SHARE = 0.08
COPYRIGHT_LINE = re.compile(r"(?im)^\W*(copyright|©|\(c\)).*\d{4}.*$")
LICENCE_FILE = re.compile(r"licen[cs]e|copying|copyright|notice|eula|patents", re.IGNORECASE)
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}

Counts = dict[str, dict[str, int]]
Texts = Iterable[tuple[str, str]]  # url, text


def build(root: Path, vocabulary: int = 2048) -> Counts:
    """Writes `root`/data/CORPUS/*.json.gz, shaped like C4, and `root`/tokenizer unless they are there.

    Returns per corpus its documents, characters, compressed bytes and shards (validation included), and
    how many of the documents and characters are validation. The same machine writes the same bytes.
    """
    data, tokenizer, partial = root / "data", root / "tokenizer", root / "corpora.partial"
    if tokenizer.is_dir() and (data / SUMMARY).is_file():
        finished = json.loads((data / SUMMARY).read_text())
        if finished["vocabulary"] == vocabulary:
            return Counts(finished["corpora"])
    for leftover in (partial, data, tokenizer):
        shutil.rmtree(leftover, ignore_errors=True)

    seen: set[int] = set()  # one for both corpora: neither may hold the other's validation text
    counts, train = Counts(), list[str]()
    for corpus, texts in {"legal": legal_texts(), "general": general_texts()}.items():
        documents = unseen(texts, seen, prose_only=corpus == "legal")
        counts[corpus], train_texts = write_corpus(partial / "data" / corpus, corpus, documents)
        train += train_texts
    write_tokenizer(partial / "tokenizer", train, vocabulary)
    (partial / "data" / SUMMARY).write_text(json.dumps({"vocabulary": vocabulary, "corpora": counts}))

    (partial / "tokenizer").rename(tokenizer)
    (partial / "data").rename(data)  # last: the summary in it says that all is there
    partial.rmdir()
    return counts


def general_texts() -> Iterator[tuple[str, str]]:
    """The topics of Python's `help`, then the standard library's docstrings: one text per class or module."""
    for topic in sorted(topics):
        yield f"python-docs://topics/{topic}", topics[topic]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if NOT_LIBRARY.intersection(parts):
            continue
        name, tree = ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_bytes())
        for child in [child for child in tree.body if isinstance(child, ast.ClassDef)]:
            text = docstrings(child, f"{name}.{child.name}")
            if len(text) >= SHORTEST_CHARACTERS:
                yield f"python-docs://library/{name}.{child.name}", text
                tree.body.remove(child)  # the module's text is what is left
        yield f"python-docs://library/{name}", docstrings(tree, name)


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    """The docstring of `node` and those of the classes and functions in it, each under its full name."""
    own = ast.get_docstring(node)
    texts = [f"{name}\n{own}"] if own else []
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(docstrings(child, f"{name}.{child.name}"))
    return "\n\n".join(filter(None, texts))


def legal_texts() -> Iterator[tuple[str, str]]:
    """Licences: the system's whole ones first, then the installed packages', then Debian's collections."""
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        if path.is_file():
            yield f"file://{path}", path.read_text("utf-8", "replace")
    packages = Path(sysconfig.get_path("purelib"))
    files = (path for path in packages.rglob("*") if LICENCE_FILE.search(path.name) and path.is_file())
    for path in sorted(files):
        url = f"site-packages://{path.relative_to(packages).as_posix()}"
        if path.suffix == ".py":  # some packages carry licences as constants
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{url}:{node.lineno}", node.value
        elif path.suffix != ".pyc":
            yield url, path.read_text("utf-8", "replace")
    for path in sorted(Path("/usr/share/doc").glob("*/copyright")):
        # Its fields are indented and mark empty lines with a dot.
        yield f"file://{path}", re.sub(r"(?m)^ \.?", "", path.read_text("utf-8", "replace"))


def unseen(texts: Texts, seen: set[int], prose_only: bool) -> Iterator[tuple[str, str]]:
    """Documents of the paragraphs whose words are not in `seen` yet; adds them to `seen`."""
    for url, text in texts:
        kept = []
        for paragraph in paragraphs(COPYRIGHT_LINE.sub("", text) if prose_only else text):
            words = re.findall(r"\w+", paragraph.lower())
            stops = [word for word in words if word in STOP_WORDS]
            if prose_only and (len(set(stops)) < 2 or len(stops) < STOP_WORD_SHARE * len(words)):
                continue
            ends = range(SHINGLE_WORDS, max(SHINGLE_WORDS, len(words)) + 1)
            shingles = {hash(tuple(words[end - SHINGLE_WORDS : end])) for end in ends}
            if len(shingles & seen) < SEEN_SHARE * len(shingles):
                kept.append(paragraph)
            seen |= shingles
        for number, document in enumerate(packed(kept)):
            if len(document) >= SHORTEST_CHARACTERS:
                yield f"{url}#{number}", document


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text`, headings together with what follows them."""
    headings: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        headings.append(block)
        if len(re.findall(r"\w+", block)) >= HEADING_WORDS:
            yield "\n\n".join(headings)
            headings = []
    yield "\n\n".join(headings)


def packed(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined to texts of at most LONGEST_CHARACTERS, or one paragraph where that is longer."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) > LONGEST_CHARACTERS:
            yield text
            text = ""
        text = f"{text}\n\n{paragraph}" if text else paragraph
    yield text


def write_corpus(directory: Path, corpus: str, texts: Texts) -> tuple[dict[str, int], list[str]]:
    """Writes the shards of both splits to `directory`; returns the counts and the training texts."""
    directory.mkdir(parents=True)
    # By hash: an order and a split that depend on the texts alone and mix the sources.
    documents = sorted(texts, key=lambda document: hashlib.sha256(document[1].encode()).digest())
    characters = list(accumulate(len(text) for _, text in documents))
    held_out = bisect(characters, VALIDATION_SHARE * characters[-1])
    validation, train = documents[:held_out], documents[held_out:]
    for split, part, shards in (("train", train, TRAIN_SHARDS[corpus]), ("validation", validation, 1)):
        for shard in range(shards):
            rows = [{"text": text, "timestamp": TIMESTAMP, "url": url} for url, text in part[shard::shards]]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = directory / f"{corpus}-{split}.{shard:05}-of-{shards:05}.json.gz"
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))  # the time of day would change the bytes
    counts = {
        "documents": len(documents),
        "characters": characters[-1],
        "compressed_bytes": sum(path.stat().st_size for path in directory.iterdir()),
        "shards": TRAIN_SHARDS[corpus] + 1,
        "validation_documents": held_out,
        "validation_characters": sum(len(text) for _, text in validation),
    }
    return counts, [text for _, text in train]


def write_tokenizer(directory: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Trains byte-level BPE of `vocabulary` tokens and writes what transformers.AutoTokenizer loads."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    trainer.initial_alphabet = byte_level.alphabet()
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
