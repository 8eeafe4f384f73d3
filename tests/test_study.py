"""The studies of `experiments`, on a handful of documents and tiny models."""

import json
import math
import random
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer


sys.path.append(str(Path(__file__).parents[1] / "experiments"))
sys.path.extend(map(str, Path(sys.path[-1]).iterdir()))

import adapt
import common
import corpora
import make_data
import masked_study
import masked_tables
import study
import systems

from lsg_converter import families
from lsg_converter.tune import even


pytestmark = pytest.mark.newest
LENGTH = 700


@pytest.fixture(scope="module")
def sentence(tmp_path_factory):
    """A sentence model of 512 tokens, tiny and random."""
    folder = tmp_path_factory.mktemp("models") / "sentence"
    SentenceTransformer(str(GOLDEN / "bert" / "source")).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Six texts of 720 words, of which each has words of its own; the file that holds them."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices([f"w{10 * n + m}" for m in range(5, 25)], k=720))} for n in range(6)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture
def model(sentence):
    return systems.Model.load(str(sentence), "cpu")


def flags(sentence, texts, output, *more):
    names = ["--model", sentence, "--corpus", texts, "--output", output, "--device", "cpu", "--lengths", LENGTH]
    return [*map(str, names), "--sparsity_types", "norm", "none", *more]


def test_a_study(sentence, texts, tmp_path, monkeypatch, capsys):
    """Every system has a row with what it costs; what was measured is not measured again."""
    assert study.main(flags(sentence, texts, tmp_path)) == 0
    text = (tmp_path / "results.md").read_text()
    assert (tmp_path / "study.png").is_file() and text in capsys.readouterr().out
    rows = {
        row["reader"] + ": " + row["system"]: row
        for path in (tmp_path / str(LENGTH)).iterdir()
        for row in json.loads(path.read_text())["results"]
    }
    whole = ["one vector", "late chunks of 512", "late chunks of 128"]
    settings = [f"LSG {name}" for name in (
        "norm, block 128, factor 2, 0 globals, tile", "none, block 128, factor 2, 0 globals, tile",
        "norm, block 32, factor 2, 0 globals, tile", "norm, block 128, factor 2, 1 global, tile",
        "norm, block 128, factor 2, 0 globals, interpolate",
    )]  # fmt: skip
    assert rows.keys() == {
        "BM25: no vectors", "source, first 512 tokens: first 512 tokens",
        *(f"source, chunks of {n}: {kind} chunk{'s' * (kind != 'best')} of {n}".replace("mean chunks", "mean of chunks")
          for n in (512, 128) for kind in ("mean", "best")),
        *(f"{name}: tokens pooled by 8" for name in ("source, chunks of 512", "full attention", settings[0])),
        *(f"{name}: {system}" for name in ("full attention", *settings) for system in whole),
    }  # fmt: skip
    assert len({str(rows[f"{name}: one vector"]["metrics"]["nDCG@10"]) for name in settings}) > 1
    for row in rows.values():
        assert all(len(values) == 12 and 0 <= min(values) <= max(values) <= 1 for values in row["metrics"].values())
        assert row["index_bytes"] == 4 * 16 * row["vectors"] or row["reader"] == "BM25"
    assert np.mean(rows["BM25: no vectors"]["metrics"]["recall@1"]) == 1
    counts = [rows[f"source, chunks of {n}: best chunk of {n}"]["vectors"] for n in (512, 128)]
    assert counts == [2, 6] and rows[f"{settings[0]}: late chunks of 128"]["vectors"] == 6
    assert "| LSG, one vector | 1.0 | 0.06 |" in text and "| none, block 128, factor 2, 0 globals, tile |" in text

    monkeypatch.setattr(systems.Study, "run", None)
    assert study.main(flags(sentence, texts, tmp_path)) == 0
    assert (tmp_path / "results.md").read_text() == text


def test_readers_read_what_they_say(model, sentence):
    """A vector is the library's own; a span's is the mean of the states of its tokens."""
    library = SentenceTransformer(str(sentence), device="cpu")
    text = " ".join(f"w{n}" for n in range(5, 105))
    ids = model.words(text)
    ((vector, states),) = model.read([ids], "document", 2)
    expected = torch.nn.functional.normalize(torch.tensor(library.encode(text)), dim=-1)
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)
    assert states.shape == (100, 16) and model.extra("document") == 2
    means = model.means(states, 40)
    spans = [states[:33], states[33:66], states[66:]]
    expected = torch.stack([torch.nn.functional.normalize(span.mean(0), dim=-1) for span in spans])
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-6)
    both = list(model.read([ids, ids[:7]], "document", 2))  # padding changes nothing
    torch.testing.assert_close(both[0][0], vector, rtol=0, atol=1e-6)
    assert both[1][1].shape == (7, 16)


def test_parts_are_even_and_hold_each_token_once():
    ids = list(range(1022))
    parts = even(ids, 510)
    assert [len(part) for part in parts] == [340, 341, 341] and [*chain(*parts)] == ids
    assert even(ids[:510], 510) == [ids[:510]] and systems.first(ids, 510) == [ids[:510]] and even([], 510) == [[]]


def test_bm25_scores_words_and_none_where_there_are_none():
    corpus = corpora.Corpus(["the red house", "the blue house", "a green door"], ["blue house", "?"], [[1], [2]])
    (row,) = systems.Study(None, 1024, corpus, 512).run(systems.Reader("BM25", "BM25", "bm25"))
    assert row.metrics["recall@1"] == [1, 0] and row.vectors == 0
    assert row.index_bytes > 8 * 8 / 3  # of three documents, eight words, each with a score and a number of 4 bytes


def test_measures():
    """The document of the first query is first, that of the second is second, and that of the third tenth or later."""
    scores = torch.stack([torch.arange(12.0), torch.arange(12.0), torch.arange(12.0)])
    found = systems.measure(scores, [[11], [10], [1]])
    assert found["recall@1"] == [1, 0, 0] and found["MRR@10"] == [1, 0.5, 0]
    assert found["nDCG@10"] == pytest.approx([1, 1 / math.log2(3), 0])


def test_intervals_draw_documents_with_their_queries():
    """Three queries of one document are as one query; of a constant the interval is a point."""
    values = np.random.default_rng(1).random(40).tolist()
    alone = common.interval(values, common.draws(range(40)))
    tripled = [value for value in values for _ in range(3)]
    together = common.interval(tripled, common.draws([place for place in range(40) for _ in range(3)]))
    assert together == pytest.approx(alone)
    apart = common.interval(tripled, common.draws(range(120)))
    assert apart[1] - apart[0] < 0.7 * (alone[1] - alone[0])
    assert alone[0] < np.mean(values) < alone[1]
    assert common.interval([0.5] * 40, common.draws(range(40))) == (0.5, 0.5)


# Corpora


def test_a_passage_is_from_beyond_and_loses_a_third(model):
    words = [f"w{5 + n % 115}" for n in range(1000)]
    spans = corpora.Spans(" ".join(words), model.tokenizer)
    assert len(spans) == 1000 and spans.part(3, 6) == " ".join(words[3:6])
    for seed in range(20):
        kept = corpora.passage(spans, 800, random.Random(seed)).split()
        assert len(kept) == 40
        starts = [n for n in range(600, 741) if is_within(kept, words[n : n + 60])]
        assert starts


def is_within(part, whole):
    rest = iter(whole)
    return all(word in rest for word in part)


def test_long_texts_give_several_documents_and_short_ones_none(model):
    texts = [" ".join(f"w{5 + (7 * n + m) % 115}" for m in range(size)) for n, size in enumerate((650, 1500, 9000))]
    corpus = corpora.with_passages(texts, model.tokenizer, 700, 100, 2)
    assert len(corpus.documents) == 2 + corpora.PIECES
    assert corpus.relevant == [[place] for place in range(6) for _ in range(2)]
    assert len(corpora.with_passages(texts, model.tokenizer, 700, 3, 2).documents) == 3
    few = corpora.with_passages(texts[:2], model.tokenizer, 700, 4, 2)
    more = corpora.with_passages(texts[:2], model.tokenizer, 700, 4, 2, further=lambda: texts)
    assert (len(few.documents), len(more.documents)) == (2, 4)
    assert (more.documents[:2], more.queries[:4]) == (few.documents, few.queries)


def test_prose_of_a_file():
    source = '"""What this module is for, in words."""\n\n# A comment of two lines\n# that belong together.\n'
    source += "x = 1  # what stands behind code is left out\n"
    source += 'def f():\n    """Gives one to those who ask."""\n'
    assert make_data.prose(source) == [
        "What this module is for, in words.", "A comment of two lines\nthat belong together.",
        "Gives one to those who ask.",
    ]  # fmt: skip


def test_pairs_and_longembed(model, tmp_path, monkeypatch):
    """Queries that a corpus brings are taken, with all documents that answer them."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"w{5 + n}", "document": f"w{5 + n // 2} w9 w10"} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = corpora.load(str(path), model.tokenizer, 2, 10, 1)
    assert corpus == corpora.Corpus(["w5 w9", "w6 w9"], ["w5", "w6", "w7", "w8"], [[0], [0], [1], [1]])

    parts = {
        "corpus": [{"doc_id": "a", "text": "w5 w6 w7"}, {"doc_id": "b", "text": "w8"}],
        "queries": [{"qid": "q", "text": "w7"}, {"qid": "none", "text": "w9"}],
        "qrels": [{"qid": "q", "doc_id": "b"}, {"qid": "q", "doc_id": "a"}],
    }
    exceptions = SimpleNamespace(DatasetsError=ValueError)
    hub = SimpleNamespace(load_dataset=lambda name, task: {"narrativeqa": parts}[task], exceptions=exceptions)
    monkeypatch.setattr(common, "need", lambda name: hub)
    corpus = corpora.load("longembed/narrativeqa", model.tokenizer, 2, 10, 1)
    assert corpus == corpora.Corpus(["w5 w6", "w8"], ["w7"], [[1, 0]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "512"], "--lengths, --chunk_lengths: got 512 and 512; the source reads 512 tokens"),
        (["--lengths", "600"], "--corpus: "),
        (["--readers", "all"], "--readers: got 'all'; give some of bm25, truncation"),
        (["--queries", "0"], "--queries: got 0; give 1 or more"),
        (["--position_init", "wrap"], "--position_init: got 'wrap'"),
        (["--corpus", "nowhere"], "--corpus: got 'nowhere'; give built-in, a .jsonl file, or longembed/"),
        (["--wrong"], "Some specified arguments are not used by the HfArgumentParser"),
    ],
)
def test_what_cannot_be_is_one_line(more, message, sentence, texts, tmp_path, capsys):
    assert study.main(flags(sentence, texts, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error


def adapted(sentence, texts, target, *more):
    """The losses of an adaptation."""
    names = ["--model", sentence, "--corpus", texts, "--max_seq_length", LENGTH, "--output_dir", target, "--use_cpu"]
    names += ["--per_device_train_batch_size", "3", "--logging_steps", "1", "--save_strategy", "no", "--do_train"]
    assert adapt.main([*map(str, names), "--disable_tqdm", "true", *more]) == 0
    log = json.loads((target / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.full
def test_adaptation_learns_to_find_a_document_by_its_passages(sentence, texts, tmp_path):
    losses = adapted(sentence, texts, tmp_path, "--max_steps", "16", "--learning_rate", "0.003")
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == LENGTH


def test_the_tables_that_train_alone():
    """Of a model with a head, positions and global tokens learn with it; all else stays."""
    config = families.family("bert").config_class(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = families.family("bert").lsg_class("BertForMaskedLM")(config)
    common.choose_trained(model, SimpleNamespace(train="positions"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = {name for name in trained if name.startswith("bert.")}
    assert inside == {f"bert.embeddings.{name}.weight" for name in ("position_embeddings", "global_embeddings")}
    assert any(name.startswith("cls.") for name in trained)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--objective", "mean"], marks=pytest.mark.full),
        ["--objective", "best"],
        pytest.param(["--train", "lora", "--lora_rank", "2"], marks=pytest.mark.full),
        ["--adapt", "source"],
    ],
)
def test_other_ways_to_adapt(more, sentence, texts, tmp_path):
    """Each learns, and is measured: the long model with one vector, the source in chunks."""
    steps = ["--max_steps", "8", "--learning_rate", "0.01", "--do_predict", "--study", str(tmp_path / "study")]
    losses = adapted(sentence, texts, tmp_path / "out", *steps, *more)
    assert sum(losses[-2:]) < sum(losses[:2]), losses
    text = (tmp_path / "out" / "results.md").read_text()
    rows = ["source, mean of chunks of 512", "source, best chunk of 128"] if "source" in more else ["LSG, one vector"]
    assert all(text.count(f"| adapted {name} |") == 2 for name in rows)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() is ("lora" in more)
    assert (tmp_path / "study" / "700").is_dir()


def test_the_best_chunk_is_what_scores_are_learned_from():
    """Where the model gives the source's own shares, nothing is left to learn."""
    vectors = torch.eye(3)
    model = iter([{"sentence_embedding": vectors}, {"sentence_embedding": vectors}] * 2).__next__
    same, other = adapt.BestChunk(lambda part: model(), vectors), adapt.BestChunk(lambda part: model(), 1 - vectors)
    assert same([{}, {}], torch.arange(3)) == pytest.approx(0, abs=1e-6)
    assert other([{}, {}], torch.arange(3)) > 1


def test_the_source_cannot_learn_from_itself(sentence, texts, tmp_path, capsys):
    flags = ["--model", sentence, "--corpus", texts, "--output_dir", tmp_path, "--adapt", "source", "--do_train"]
    assert adapt.main([*map(str, flags), "--use_cpu", "--objective", "mean"]) == 2
    assert capsys.readouterr().err.startswith("error: --objective: got 'mean', for which the source is the model to")


def test_positions_are_adapted_alone_and_measured_on_other_documents(sentence, texts, tmp_path):
    more = ["--train", "positions", "--max_steps", "1", "--learning_rate", "0.01", "--do_predict"]
    adapted(sentence, texts, tmp_path, *more)
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "models" / "tile-700", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embeddings.position_embeddings.weight"}
    text = (tmp_path / "results.md").read_text()
    assert "3 documents, 6 queries" in text
    for name in ("source, best chunk of 512", "LSG, one vector", "adapted LSG, one vector"):
        assert text.count(f"| {name} |") == 2


# A masked model that is trained here


@pytest.mark.full
def test_a_masked_study(texts, tmp_path, monkeypatch, capsys):
    """What the source could read is guessed as by the source, by full attention over stretched positions; what was
    measured is not measured again."""
    small = "--words 200 --layers 1 --width 64 --source_length 64 --steps 2 --batch_size 4 --lengths 320 --fp32"
    more = "--adapt_steps 1 --adapt_batch_size 1 --sparsity_types none norm --position_init stretch --parts lora"
    flags = ["--corpus", str(texts), "--output", str(tmp_path), *small.split(), *more.split()]
    made = []
    monkeypatch.setattr(masked_study.Study, "__init__", keeping(made, masked_study.Study.__init__))
    assert masked_study.main(flags) == 0
    text = (tmp_path / "results.md").read_text()
    assert (tmp_path / "masked.png").is_file() and text in capsys.readouterr().out
    assert "3 documents" in text
    for name, count in {
        "word frequencies": 1, "source, chunks of 16": 1, "source, chunks of 64": 2,
        "source, windows of 64 that overlap by half": 2, "full attention, stretch": 2,
        "LSG norm, block 128, stretch": 2, "LSG none, block 32, stretch": 1, "LSG norm, block 128, stretch, lora": 1,
        "none": 1, "norm": 1,
    }.items():  # fmt: skip
        assert text.count(f"| {name} |") == count, name

    assert "As adapted, none, block 256: " in text and "| then | block 128 | block 128, less none | block 32 |" in text
    (first,) = made
    own = masked_study.Reader("", "", 64, 64, 62)
    full = masked_study.lsg() | {"num_global_tokens": 0, "full_attention_length": 320}
    long = masked_study.Reader("", "", 64, 64, 64, "stretch", full)
    expected = first.losses(first.load("", 64), own)
    found = first.losses(first.load("stretch", 320), long)
    for values, others in zip(found, expected, strict=True):
        assert 0 < len(others) < 30 and values == pytest.approx(others, abs=2e-4)

    monkeypatch.setattr(masked_study.Study, "losses", None)
    assert masked_study.main(flags) == 0
    assert (tmp_path / "results.md").read_text() == text


def keeping(made, function):
    return lambda self, options: (made.append(self), function(self, options))[1]


@pytest.mark.parametrize(("length", "room", "step"), [(300, 30, 30), (300, 30, 15), (30, 30, 15), (20, 30, 30)])
def test_each_token_is_asked_once_with_tokens_around_it(length, room, step):
    parts = list(masked_study.spans(length, room, step))
    assert [place for _, first, end in parts for place in range(first, end)] == list(range(length))
    assert all(0 <= begin <= first < end <= min(begin + room, length) for begin, first, end in parts)
    if step < room < length:
        assert all(first - begin >= 7 for begin, first, _ in parts[1:])
        assert all(begin + room - end >= 7 for begin, _, end in parts[:-1])


def test_losses_by_position():
    """Of four places of each of two documents: a band has the mean of its places, and a shorter document fewer."""
    places = [[0, 6, 7, 20], [1, 7, 8, 30]]
    row = masked_tables.Row("", "", 32, [[1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 7.0, 8.0]])
    bands = masked_tables.Bands(places, masked_tables.edges(8, 32))
    assert bands.edges == [0, 8, 16, 32]
    assert [bands.mean(row, band=band)[0] for band in range(3)] == pytest.approx([2, 5, 6])
    value, low, high = bands.mean(row)
    assert (value, low, high) == pytest.approx((33 / 8, 2.5, 5.75))
    assert bands.mean(row, row) == (0, 0, 0)
    short = masked_tables.cut(row, places, 10)
    assert short.losses == [[1, 2, 3], [3, 5]] and masked_tables.edges(8, 10) == [0, 8, 10]
    assert masked_tables.Bands(places, [0, 8, 10]).mean(short, short) == (0, 0, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "128"], "--lengths: got 128; the source reads 128 tokens: give more"),
        (["--sparsity_types", "all"], "--sparsity_types: got 'all'; give some of none, norm"),
        (["--source_length", "2"], "--source_length: got 2; give 16 or more"),
        (["--batch_size", "0"], "--batch_size: got 0; give 1 or more"),
        (["--mlm_probability", "2"], "--mlm_probability: got 2.0; give a share"),
        (["--width", "0"], "--width: got 0; give 1 or more"),
        (["--width", "200"], "--width: got 200; give a multiple of 64"),
        (["--corpus", "NUMBERS"], "--corpus: "),
    ],
)
def test_what_a_masked_study_cannot_do_is_one_line(more, message, texts, tmp_path, capsys):
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 3}\n')
    more = [str(numbers) if value == "NUMBERS" else value for value in more]
    assert masked_study.main(["--corpus", str(texts), "--output", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
